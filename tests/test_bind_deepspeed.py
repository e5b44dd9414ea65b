"""bind_deepspeed takes the engine that steps this optimizer, and no other; engines here are stand-ins.

DeepSpeed itself is in test_deepspeed.py.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import Parameter
from torch.testing._internal.distributed.fake_pg import FakeStore

from epi_kernels import EPIAdamW


@pytest.fixture(autouse=True)
def ranks() -> Any:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def optimizer_of(flat: Parameter) -> EPIAdamW:
    return EPIAdamW([("flat", flat)], isolation_ratio=0.2, mask_interval=2)


class Fragment:
    """Where ZeRO-1 and 2 say that a parameter lies."""

    def __init__(self, flat: torch.Tensor, start: int, numel: int) -> None:
        self._flat, self._place = flat, SimpleNamespace(start=start, numel=numel)

    def get_hp_fragment(self) -> torch.Tensor:
        return self._flat

    def get_hp_fragment_address(self) -> Any:
        return self._place


def engine_of(zero: Any, flat: torch.Tensor, *places: tuple[int, int]) -> Any:
    module = torch.nn.Module()
    for i, (start, numel) in enumerate(places):
        param = Parameter(torch.zeros(2 * numel, dtype=torch.bfloat16))
        param._hp_mapping = Fragment(flat, start, numel)  # type: ignore[attr-defined]
        module.register_parameter(f"w{i}", param)
    return SimpleNamespace(module=module, optimizer=zero, data_parallel_group=None)


def test_an_engine_that_steps_this_optimizer_through_wrappers_is_bound() -> None:
    flat = Parameter(torch.zeros(10))
    optimizer = optimizer_of(flat)
    zero = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))
    optimizer.bind_deepspeed(engine_of(zero, flat, (0, 6), (6, 3)))
    assert [(s.name, s.start, s.entries, s.of) for s in optimizer._isolation.competition.segments or ()] == [
        ("w0", 0, 6, 12),
        ("w1", 6, 3, 6),
    ]


def test_an_engine_without_zero_is_bound_to_nothing() -> None:
    optimizer = optimizer_of(Parameter(torch.zeros(10)))
    optimizer.bind_deepspeed(SimpleNamespace(module=torch.nn.Linear(2, 2), optimizer=optimizer))
    assert optimizer._isolation.competition.segments is None


@pytest.mark.parametrize("wrapped", [True, False])
def test_an_engine_that_steps_another_optimizer_is_refused(wrapped: bool) -> None:
    flat = Parameter(torch.zeros(10))
    optimizer, other = optimizer_of(flat), torch.optim.AdamW([flat])
    engine = engine_of(SimpleNamespace(optimizer=other) if wrapped else other, flat, (0, 6))
    with pytest.raises(ValueError, match=r"the engine steps another optimizer \(AdamW\), .*initialize\(optimizer="):
        optimizer.bind_deepspeed(engine)
    assert optimizer._isolation.competition.segments is None
    with pytest.raises(ValueError, match=r"steps another optimizer \(EPIAdamW\)"):
        optimizer.bind_deepspeed(engine_of(SimpleNamespace(optimizer=optimizer_of(flat)), flat, (0, 6)))


def test_an_engine_without_an_optimizer_is_refused() -> None:
    optimizer = optimizer_of(Parameter(torch.zeros(10)))
    with pytest.raises(ValueError, match=r"the engine steps another optimizer \(NoneType\)"):
        optimizer.bind_deepspeed(SimpleNamespace(module=torch.nn.Linear(2, 2), optimizer=None))


@pytest.mark.parametrize("wrap", [torch.nn.parallel.DistributedDataParallel, torch.nn.Sequential, lambda _: None])
def test_what_is_no_engine_is_refused_with_a_sentence(wrap: Any) -> None:
    optimizer = optimizer_of(Parameter(torch.zeros(10)))
    with pytest.raises(
        TypeError, match=r"engine is a .* and has no optimizer; pass what deepspeed.initialize returned"
    ):
        optimizer.bind_deepspeed(wrap(torch.nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("places", "text"),
    [
        (((0, 6), (6, 5)), "w1 has the entries 6 to 11 of a flat partition that has 10 entries"),
        (((0, 6), (5, 3)), "w1 has the entries 5 to 8 of a flat partition that has w0 up to 6"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(places: Any, text: str) -> None:
    flat = Parameter(torch.zeros(10))
    optimizer = optimizer_of(flat)
    with pytest.raises(ValueError, match=text):
        optimizer.bind_deepspeed(engine_of(SimpleNamespace(optimizer=optimizer), flat, *places))
    assert optimizer._isolation.competition.segments is None


def test_a_partition_that_the_optimizer_does_not_have_is_refused() -> None:
    optimizer = optimizer_of(Parameter(torch.zeros(10)))
    with pytest.raises(ValueError, match="w0 lies in a flat partition that this optimizer does not have"):
        optimizer.bind_deepspeed(engine_of(SimpleNamespace(optimizer=optimizer), torch.zeros(10), (0, 6)))


def test_stage_3_groups_that_are_not_there_are_refused() -> None:
    flat = Parameter(torch.zeros(10))
    optimizer = optimizer_of(flat)
    zero = SimpleNamespace(
        optimizer=optimizer,
        grad_position={0: (0, 0, 6)},
        fp32_partitioned_groups_flat=[flat],
        sub_group_to_group_id=[3],
    )
    engine = engine_of(zero, flat, (0, 6))
    (param,) = engine.module.parameters()
    param.ds_id, param.ds_numel, param.ds_tensor = 0, 12, SimpleNamespace(ds_numel=6)
    with pytest.raises(ValueError, match="w0 is in group 3 of the engine, and the optimizer has 1"):
        optimizer.bind_deepspeed(engine)
    zero.sub_group_to_group_id = [0]
    optimizer.bind_deepspeed(engine)
    assert optimizer._isolation.competition.segments == [(flat, 0, "w0", 0, 6, 12)]
