"""Gather: a rule's step of selected entries alone."""
