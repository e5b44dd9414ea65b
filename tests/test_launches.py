"""What Triton's backend sends to the device, counted; interpreted, so that it is counted everywhere.

- One launch steps all tensors of a pair of dtypes, whatever their groups, layers, locks and AMSGrad; likewise the
  selected entries of all tensors.
- A refresh adds 8 launches at most.
- Nothing else runs on the device, and neither number depends on how many tensors there are.
- Tables go up again only when an address has changed.
- Nothing reads a value back from the device.

Device tensors are those that the optimizer was given, its states, and what `table` sends there.
"""

import functools
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from epi_kernels import EPIAdamW, SparseAdamW
from epi_kernels.backends import registry
from epi_kernels.backends.support import Spec
from epi_kernels.ops import table
from epi_kernels.optim import nonfinite

# of torch, that read or write nothing
VIEWS = {"view", "detach", "alias", "unbind", "select", "as_strided", "slice", "_unsafe_view"}


class Recorder(TorchDispatchMode):
    """Counts launches, torch's own operations on device tensors, and copies to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()
        self.kept: list[Tensor] = []  # so that no address is used twice
        self.launches: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.uploads = 0
        self.recording = True

    def add(self, tensor: Tensor) -> Tensor:
        """Count `tensor` as one on the device from now on."""
        self.kept.append(tensor)
        self.storages.add(tensor.untyped_storage().data_ptr())
        return tensor

    def upload(self, original: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """Run one of `table`'s copies to the device."""
        self.uploads += 1
        self.recording = False
        result = self.add(original(*arguments))
        self.recording = True
        return result

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if self.recording and function.namespace == "aten" and name not in VIEWS:
            inputs = torch.utils._pytree.tree_leaves((args, kwargs))
            if any(isinstance(t, Tensor) and t.untyped_storage().data_ptr() in self.storages for t in inputs):
                self.operations[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def recorder(backend: str, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    if backend != "triton":
        pytest.skip("launches are Triton's")
    from triton.runtime import interpreter

    for operation in registry.STEMS:
        registry.choose(Spec(operation), torch.device("cpu"), backend)  # imports its module
    found = Recorder()
    launch = interpreter.GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.launches[self.fn.__name__] += 1
        found.recording = False
        try:
            return launch(self, *args, **kwargs)
        finally:
            found.recording = True

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    copies = {name: getattr(table, name) for name in ("on_device", "zeros")}
    for name, module in list(sys.modules.items()):
        for copy, original in copies.items():
            if name.startswith("epi_kernels") and getattr(module, copy, None) is original:
                monkeypatch.setattr(module, copy, functools.partial(found.upload, original))
    # on the CPU it reads the counters in every step; on an accelerator only copies that have arrived
    monkeypatch.setattr(nonfinite.NonfiniteCounts, "warn", lambda *_: None)
    return found


def optimizer(count: int, recorder: Recorder, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> EPIAdamW:
    """Return an optimizer of `count` tensors in three groups, at clock 1; the third group is never locked."""
    params = [Parameter(torch.randn(3 + i % 5).to(dtypes[i % len(dtypes)])) for i in range(count)]
    for param in params:
        param.grad = torch.randn_like(param)
    groups: list[dict[str, Any]] = [
        {"params": params[0::3], "lr": 0.1},
        {"params": params[1::3], "amsgrad": True, "betas": (0.5, 0.9)},
        {"params": params[2::3], "isolation_ratio": 0.0},
    ]
    found = EPIAdamW(groups, layers="tensor", isolation_ratio=0.1, mask_interval=3, backend="triton")
    found.step()
    for param in params:
        for tensor in (param.data, param.grad, *[s for name, s in found.state[param].items() if name != "step"]):
            recorder.add(tensor)
    for counter in found._nonfinite.counters():
        recorder.add(counter)
    return found


@pytest.mark.parametrize("count", [4, 20])
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.bfloat16)])
def test_a_step_is_one_launch_for_each_pair_of_dtypes(
    recorder: Recorder, count: int, dtypes: tuple[torch.dtype, ...]
) -> None:
    stepped = optimizer(count, recorder, dtypes)
    recorder.launches.clear()
    recorder.uploads = 0
    with recorder:
        stepped.step()
    assert recorder.launches == {"masked_adamw_kernel": len(dtypes)}
    assert not recorder.operations
    assert recorder.uploads == len(dtypes)  # the scalars: nothing else has changed


@pytest.mark.parametrize("count", [4, 20])
@pytest.mark.parametrize("settings", [{}, {"threshold": "histogram"}, {"normalize": "none"}, {"scope": "layer"}])
def test_a_refresh_is_8_launches_more_at_most(recorder: Recorder, count: int, settings: dict[str, str]) -> None:
    stepped = optimizer(count, recorder)
    for group in stepped.param_groups:
        group.update(settings)
    stepped.step()
    recorder.launches.clear()
    with recorder:
        stepped.step()
    assert len(stepped._records) == 1
    passes = 1 if settings.get("threshold") == "histogram" else 3
    assert recorder.launches == {
        "importance_kernel": 1,
        "score_histogram_kernel": passes,
        "select_kernel": passes,
        "lock_kernel": 1,
        "masked_adamw_kernel": 1,
    }
    assert sum(recorder.launches.values()) <= 1 + 8
    # a copy of the counters to the host, for the telemetry
    assert set(recorder.operations) == {"_to_copy"}
    assert recorder.operations["_to_copy"] <= len(stepped._nonfinite._counters) == 2


def test_tables_go_up_again_when_a_gradient_moves(recorder: Recorder) -> None:
    stepped = optimizer(5, recorder)
    moved = stepped.param_groups[0]["params"][0]
    moved.grad = recorder.add(moved.grad.clone())
    recorder.uploads = 0
    stepped.step()
    assert recorder.uploads == 2  # the scalars, and the rows
    stepped.step()  # with a refresh
    recorder.uploads = 0
    stepped.step()
    assert recorder.uploads == 1


@pytest.mark.parametrize("count", [4, 20])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_step_of_selected_entries_is_one_launch(recorder: Recorder, count: int, transposed: bool) -> None:
    params = [Parameter(torch.randn(3 + i % 5, 2).t() if transposed else torch.randn(2, 3)) for i in range(count)]
    masks = {param: torch.rand(param.shape) < 0.5 for param in params}
    masks[params[1]] = torch.zeros_like(masks[params[1]])
    stepped = SparseAdamW(params, trainable=masks, backend="triton")
    for param in params:
        param.grad = recorder.add(torch.randn_like(param))
        recorder.add(param.data)
        for name, tensor in stepped.state[param].items():
            if name != "step":
                recorder.add(tensor)
    stepped.step()
    recorder.launches.clear()
    recorder.operations.clear()
    recorder.uploads = 0
    with recorder:
        stepped.step()
    assert recorder.launches == {"sparse_adamw_kernel": 1}
    assert not recorder.operations  # no copy of the indices either
    assert recorder.uploads == 1  # the scalars
