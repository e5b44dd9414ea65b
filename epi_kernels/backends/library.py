"""Loads the compiled libraries of the package with ctypes, or says why a library cannot be loaded."""

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def load(
    stem: str, version_function: str, version: int, functions: Mapping[str, tuple[Any, Sequence[Any]]], needs: str
) -> ctypes.CDLL | str:
    """Load a library and declare its functions.

    Args:
        stem: the name of the library's file, without the extension.
        version_function: the function that returns the version of the library's interface.
        version: the version that the caller was written for.
        functions: name -> the result and the arguments, as ctypes types.
        needs: what is needed to build the library.

    Returns:
        The library, or why it cannot be used here and what to do about it.
    """
    paths = sorted(Path(__file__).parents[1].glob(f"{stem}*.so"))
    if not paths:
        # without the first command, pip installs the wheel in its cache
        return (
            f"it was not built; where there is {needs}, run `pip cache remove epi_kernels` and "
            "`pip install --force-reinstall --no-deps epi-kernels`"
        )
    try:
        library = ctypes.CDLL(str(paths[0]))
    except OSError as error:
        return f"{paths[0].name} does not load on this platform ({error}); install the package again here"
    if library[version_function]() != version:
        return f"{paths[0].name} is of another version of the package; install it again"
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
