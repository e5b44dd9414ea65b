"""Warnings that point at the line of the user's program, however deep in the package or in torch they arise."""

import os
import sys
import warnings
from types import FrameType

import torch

# files in these folders are not the program's: a warning must not point into them
_INSIDE = (os.path.dirname(__file__) + os.sep, os.path.dirname(torch.__file__) + os.sep)

# the name of code that torch.compile makes, which is in no file
_COMPILED = "<eval_with_key>"

# libraries that make and step optimizers for a program
_FRAMEWORKS = frozenset({"accelerate", "deepspeed", "lightning", "pytorch_lightning", "transformers", "trl"})


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn of `message` at the innermost line that is not this package's, torch's or a training framework's."""
    level, frame = 2, sys._getframe(1)
    while not _is_program(frame) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _is_program(frame: FrameType) -> bool:
    library, _, _ = str(frame.f_globals.get("__name__")).partition(".")
    return library not in _FRAMEWORKS and not frame.f_code.co_filename.startswith((*_INSIDE, _COMPILED))
