"""What stands in for a GPU where the CPU rehearses tests/test_gpu.py: `EPI_GPU_TESTS_ON=cpu TRITON_INTERPRET=1 pytest`.

Kernels are interpreted and launches of kernels are counted there. A graph captures nothing: its replay takes the step
again. Streams do not exist, and nothing waits.
"""

import contextlib
import os
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import measure
import pytest
import torch

from epi_kernels.engine import state
from epi_kernels.engine.sweeping import Sweeping

DEVICE = os.environ.get("EPI_GPU_TESTS_ON", "cuda")
ON_GPU = DEVICE == "cuda"


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace what tests/test_gpu.py takes from torch.cuda, and how it counts kernels."""
    stream = SimpleNamespace(wait_stream=lambda _: None)
    for name, replacement in {
        "CUDAGraph": Graph,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "graph": Capture,
        "mem_get_info": lambda: (1 << 40, 1 << 40),
        "set_sync_debug_mode": lambda _: None,
        "stream": lambda _: contextlib.nullcontext(),
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(state, "_get_capturable_supported_devices", lambda: [DEVICE])
    monkeypatch.setattr(measure, "kernels", interpreted_kernels)


class Graph:
    """A graph that has captured nothing."""

    replay: Callable[[], object] | None = None


class Capture:
    """In its context a step is checked and planned, and not taken; as with torch, leaving an empty graph warns."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.patches = graph, pytest.MonkeyPatch()

    def __enter__(self) -> None:
        def take(_: Sweeping, owner: Any, *rest: object) -> None:
            self.graph.replay = owner.step

        self.patches.setattr(Sweeping, "_take", take)
        self.patches.setattr(torch.cuda, "is_available", lambda: True)
        self.patches.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    def __exit__(self, *_: object) -> None:
        self.patches.undo()
        if self.graph.replay is None:
            warnings.warn("The CUDA Graph is empty. This usually means that the graph was ...", stacklevel=2)


def interpreted_kernels(step: Callable[[], object]) -> list[str]:
    """Return the names of the kernels that a step launches in Triton's interpreter."""
    from triton.runtime.interpreter import GridExecutor

    names, launch = [], GridExecutor.__call__

    def noted(executor: Any, *arguments: object, **constants: object) -> object:
        names.append(executor.fn.__name__)
        return launch(executor, *arguments, **constants)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(GridExecutor, "__call__", noted)
        step()
    return names
