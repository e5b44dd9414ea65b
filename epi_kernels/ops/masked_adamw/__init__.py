"""Masked AdamW: importance and a locked AdamW step in one sweep."""
