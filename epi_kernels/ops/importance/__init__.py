"""Importance: the EMA of squared gradients with each layer's range."""
