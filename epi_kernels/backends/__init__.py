"""The backends of the operations: what each of them can run, on which devices, and which one is chosen.

`support` says what a backend is asked and what it answers, and `target` describes the device. `triton`, `cuda`,
`native` and `reference` are the backends, and `registry` chooses one. `library` loads the compiled libraries.
"""
