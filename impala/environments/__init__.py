"""The environments behind `environments.create_environment`. No TensorFlow here."""
