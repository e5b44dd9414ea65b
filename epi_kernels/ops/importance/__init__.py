"""Importance: the EMA of squared gradients with each layer's range, and sums of gradients and their squares."""
