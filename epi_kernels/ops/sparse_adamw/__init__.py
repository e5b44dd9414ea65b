"""Sparse AdamW: gather, step and scatter over selected entries alone."""
