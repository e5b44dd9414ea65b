"""Gather: a rule's step for the trainable entries only."""
