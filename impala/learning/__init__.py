"""The learner: losses, optimizers, and the devices it trains on."""
