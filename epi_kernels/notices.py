"""Warnings that point at the line of the user's program, however deep in the package or in torch they arise."""

import os
import sys
import warnings

import torch

# files in these folders are not the program's: a warning must not point into them
_INSIDE = (os.path.dirname(__file__) + os.sep, os.path.dirname(torch.__file__) + os.sep)

# the name of code that torch.compile makes, which is in no file
_COMPILED = "<eval_with_key>"


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn of `message` at the innermost line that is neither this package's nor torch's."""
    level, frame = 2, sys._getframe(1)
    while frame.f_code.co_filename.startswith((*_INSIDE, _COMPILED)) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
