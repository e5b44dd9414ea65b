"""The backends that are compared with the reference: the native one on each of its SIMD levels."""

import ctypes
import functools
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from conftest import AVAILABLE

from epi_kernels.backends import library, native

CHALLENGERS = [
    (backend, level)
    for backend in AVAILABLE
    if backend != "reference"
    for level in ((1, 3, 4) if backend == "native" else (4,))
]


@functools.cache
def library_at(level: int) -> ctypes.CDLL:
    """Return a library of its own, which has chosen its SIMD level with this one as the highest."""
    folder = Path(tempfile.mkdtemp())
    for path in Path(library.__file__).parents[1].glob("_native*.so"):
        shutil.copy(path, folder)
    with (
        mock.patch.object(library, "__file__", str(folder / "backends" / "library.py")),
        mock.patch.dict(os.environ, {"EPI_KERNELS_SIMD_LEVEL": str(level)}),
    ):
        loaded = native._load.__wrapped__()
        loaded.epi_simd_level()
    shutil.rmtree(folder)
    return loaded


def chosen(challenger: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a backend, which runs on its SIMD level from now on; skip where there is no such level."""
    name, level = challenger
    if name == "native":
        loaded = library_at(level)
        monkeypatch.setattr(native, "_load", lambda: loaded)
        if native.simd_level() != level:
            pytest.skip(f"this machine or platform has no SIMD level {level}; it runs {native.simd_level()}")
    return name
