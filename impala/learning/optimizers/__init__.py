"""The optimizers: RMSProp as TensorFlow 1 computed it, and Adam."""
