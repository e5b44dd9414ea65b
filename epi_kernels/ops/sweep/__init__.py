"""Sweep: the importance, a rule and the lock, in one pass over all entries."""
