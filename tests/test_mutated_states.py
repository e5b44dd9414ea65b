"""A state with junk in it is refused with ValueError and nothing has changed, or it is taken and the next step runs.

Values of the groups and of the entries are replaced, dropped and swapped at random, by seed; a failure names its seed.
"""

import copy
import random
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from states import same_state
from torch.nn import Parameter

from epi_kernels import EPIAdamW, MaskedAdamW, SparseAdamW

MASK = torch.arange(12, device="cpu").view(4, 3) % 2 == 0
BUILDS: dict[str, Callable[..., Any]] = {
    "EPIAdamW": lambda groups: EPIAdamW(groups, isolation_ratio=0.2, mask_interval=2),
    "EPIAdamW, exp_avg_sq": lambda groups: EPIAdamW(
        groups, isolation_ratio=0.2, mask_interval=2, importance="exp_avg_sq", amsgrad=True
    ),
    "MaskedAdamW": lambda groups: MaskedAdamW(groups, frozen={"a": MASK}),
    "SparseAdamW": lambda groups: SparseAdamW(groups, trainable={"a": MASK}),
}

# what may stand where something else belongs; made anew each time
JUNK: list[Callable[[], Any]] = [
    lambda: None,
    lambda: True,
    lambda: 0,
    lambda: 1,
    lambda: -1,
    lambda: 7,
    lambda: 10**400,
    lambda: 0.5,
    lambda: 1e300,
    lambda: float("nan"),
    lambda: float("inf"),
    lambda: -0.1,
    lambda: 1j,
    lambda: "junk",
    lambda: b"junk",
    list,
    dict,
    tuple,
    lambda: [1.0],
    lambda: [True, False],
    lambda: (0.9,),
    lambda: (0.9, 0.999),
    lambda: [0.5, 0.9],
    lambda: (0.9, 0.99, 0.999),
    lambda: (0.9, "x"),
    lambda: {"a": 1},
    lambda: object,
    lambda: lambda name: name,
    lambda: np.float32(0.25),
    lambda: np.int64(3),
    lambda: np.bool_(True),
    lambda: np.array([1.0, 2.0]),
    lambda: np.array(0.5),
    lambda: Fraction(1, 4),
    lambda: torch.tensor(0.5),
    lambda: torch.tensor(3),
    lambda: torch.tensor(True),
    lambda: torch.tensor(1j),
    lambda: torch.tensor([0.5]),
    lambda: torch.tensor([0.5, 0.5]),
    lambda: torch.tensor(float("nan")),
    lambda: torch.zeros(0),
    lambda: torch.zeros((), device="meta"),
    lambda: torch.ones(4, 3),
    lambda: torch.ones(3).expand(4, 3),
    lambda: torch.ones(4, 3, dtype=torch.float64),
    lambda: torch.ones(4, 3, dtype=torch.bfloat16),
    lambda: torch.ones(4, 3, dtype=torch.int8),
    lambda: torch.ones(4, 3, dtype=torch.bool),
    lambda: torch.ones(4, 3, dtype=torch.complex64),
    lambda: torch.ones(4, 3).to(torch.float8_e4m3fn),
    lambda: torch.ones(3, 4).t(),
    lambda: torch.ones(4, 3).to_sparse(),
    lambda: torch.zeros(4, 3, device="meta"),
    lambda: torch.quantize_per_tensor(torch.ones(4, 3), 0.1, 0, torch.qint8),
    lambda: torch.tensor([0, 2, 4]),
    lambda: torch.tensor([0, 2, 99]),
    lambda: torch.tensor([4, 2, 0]),
    lambda: Parameter(torch.ones(4, 3)),
    lambda: "ema",
    lambda: "exp_avg_sq",
    lambda: "block",
    lambda: "tensor",
    lambda: "none",
]
# what is not what was saved, and may do
NEAR: dict[type, list[Callable[[Any], Any]]] = {
    bool: [np.bool_, int, lambda flag: not flag],
    float: [np.float64, np.float32, lambda x: x / 2, lambda x: Fraction(x).limit_denominator(1000), torch.tensor],
    int: [np.int64, float, lambda n: n + 1, torch.tensor],
    tuple: [list, lambda pair: tuple(map(np.float32, pair)), lambda pair: (0, pair[1])],
    str: [np.str_],
    torch.Tensor: [
        lambda t: t.double(),
        lambda t: t.bfloat16(),
        lambda t: t.half(),
        lambda t: t.to(torch.int64),
        lambda t: t.reshape(-1)[:1].reshape([1] * t.dim()).expand(t.shape) if t.numel() else t,
        lambda t: t.clone().t().contiguous().t() if t.dim() == 2 else t[None][0],
        lambda t: Parameter(t.clone()) if t.is_floating_point() else t,
        lambda t: -t if t.is_floating_point() else t + 1,
        lambda t: t.flatten(),
        lambda t: t.to(torch.float8_e4m3fn) if t.is_floating_point() else t,
        lambda t: torch.complex(torch.zeros_like(t), t).conj().imag if t.dtype == torch.float32 else t,
    ],
}
EXTRA = ("importance", "frozen", "trainable", "indices", "max_exp_avg_sq", "junk", 3)


def built(build: Callable[..., Any]) -> tuple[Any, list[Parameter]]:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator, dtype=torch.float32)) for shape in ((4, 3), (3,), (2,))]
    a, b, c = params
    return build([{"params": [("a", a), ("b", b)]}, {"params": [("c", c)], "lr": 0.1}]), params


def train(optimizer: Any, params: list[Parameter], first: int, last: int) -> None:
    for step in range(first, last + 1):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float32)
        optimizer.step()


def near(value: Any, choose: random.Random) -> Any:
    """Return a value of another kind than `value`, which may do in its place."""
    return choose.choice(NEAR.get(type(value), [lambda same: same]))(value)


def whole(state: Any) -> bool:
    """Return whether a state has groups and entries left to change."""
    groups, entries = state.get("param_groups"), state.get("state")
    return (
        isinstance(groups, list)
        and isinstance(entries, dict)
        and bool(entries)
        and all(isinstance(part, dict) and part for part in [*groups, *entries.values()])
        and all(isinstance(group.get("params"), list) for group in groups)
    )


def mutate(state: dict[str, Any], choose: random.Random) -> str:
    """Change one place of a state, and return what was done."""
    kind = choose.choice(["group", "group", "group", "all groups", "entry", "entry", "entry", "params", "state"])
    junk = choose.choice(JUNK)()
    if kind in ("group", "all groups"):
        group = choose.choice(state["param_groups"])
        key = choose.choice(list(group))
        for each in state["param_groups"] if kind == "all groups" else [group]:
            if choose.random() < 0.1:
                each.pop(key, None)
            else:
                each[key] = near(each.get(key), choose) if choose.random() < 0.5 else junk
        return f"{kind}: {key} = {group.get(key)!r}"
    if kind == "entry":
        number = choose.choice(list(state["state"]))
        entry = state["state"][number]
        key = choose.choice([*entry, choose.choice(EXTRA)])
        if choose.random() < 0.1:
            entry.pop(key, None)
        else:
            entry[key] = near(entry.get(key), choose) if choose.random() < 0.6 else junk
        return f"entry {number}: {key} = {entry.get(key)!r}"
    if kind == "params":
        group = choose.choice(state["param_groups"])
        group["params"] = choose.choice(
            [[], group["params"][::-1], group["params"] * 2, [0] * len(group["params"]), [junk], junk, ["a", "b"]]
        )
        return f"params = {group['params']!r}"
    if choose.random() < 0.5:
        state["state"][choose.choice([0, 1, 2, 9, "a"])] = junk
    else:
        state[choose.choice(["state", "param_groups"])] = junk
    return f"state, {junk!r}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
@pytest.mark.parametrize("block", range(2))
def test_junk_is_refused_and_changes_nothing_or_the_next_steps_run(build: Callable[..., Any], block: int) -> None:
    refused = 0
    for seed in range(200 * block, 200 * block + 200):
        choose = random.Random(seed)
        optimizer, params = built(build)
        train(optimizer, params, 1, 3)
        state = copy.deepcopy(optimizer.state_dict())
        done = [mutate(state, choose) for _ in range(choose.choice([1, 1, 1, 2])) if whole(state)]
        before, held = copy.deepcopy(optimizer.state_dict()), vars(optimizer).copy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                optimizer.load_state_dict(state)
            except ValueError:
                refused += 1
                assert same_state(optimizer.state_dict(), before), f"seed {seed}: {done}"
                assert vars(optimizer).keys() == held.keys(), f"seed {seed}: {done}"
            except Exception as error:
                raise AssertionError(f"seed {seed}: {done}") from error
            try:
                train(optimizer, params, 4, 6)
                saved = optimizer.state_dict()
                optimizer.load_state_dict(saved)
                train(optimizer, params, 7, 7)
            except Exception as error:
                raise AssertionError(f"seed {seed}, the step: {done}") from error
    assert 80 < refused < 170
