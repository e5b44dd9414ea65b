"""The backends of the operations: what each can run, on which devices, and which one runs."""
