"""Sweeps: random search and population based training."""
