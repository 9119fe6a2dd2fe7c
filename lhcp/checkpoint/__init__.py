"""Checkpoints: written while training goes on, published whole or not at all, checked when they are read."""
