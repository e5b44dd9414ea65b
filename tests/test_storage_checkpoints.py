"""Checkpoints of every storage: saved, loaded into every other, refused, resumed; and weights that a program writes.

- torch.optim.AdamW stops at codes. Values of torch, and ours of every storage, go into every other, with one warning.
- What does not fit is refused by an error that names it and the way out, and leaves the optimizer as it was.
- A run that is resumed in a new process is uninterrupted, bit for bit, whichever of state and model is loaded first.
- With more bits than the parameter has, a weight is what a program has last written, and its rest at most.
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import storing
import torch
from sharding import expect
from states import same_state
from storing import BFLOAT16, STORAGES, SmallNet, model_of, named, optimizer_of, train
from torch import Tensor

from epi_kernels.engine.storages import stored
from epi_kernels.storage import block8, split

SLOTS = ("exp_avg", "exp_avg_sq")


def trained(kind: str, settings: dict[str, Any], steps: int = 3) -> tuple[Any, Any]:
    """Return a model and its optimizer after some steps."""
    model = model_of(SmallNet)
    optimizer = optimizer_of(kind, model, **settings)
    train(named(model), optimizer, 1, steps)
    return model, optimizer


def load(optimizer: Any, state: dict[str, Any]) -> list[str]:
    """Load a copy of a state, and return the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.load_state_dict(copy.deepcopy(state))
    return [str(one.message) for one in caught]


def value(state: dict[str, Any], name: str) -> Tensor:
    """Return the float32 values of a slot or an importance."""
    tensor, scales = stored(state, name)
    assert tensor is not None, (name, state.keys())
    return tensor.float() if scales is None else block8.decoded(tensor, scales)


def half_a_step(of: Tensor) -> Tensor:
    """Return how far a value may be from its code: half of what lies between two codes, and a unit of float32."""
    scales = block8._of_entries(block8._largest(of.abs()), of.shape) / block8.LARGEST**2
    return 0.5 * scales * (2 * (of.abs() / scales.clamp(min=1e-38)).sqrt() + 1) * 1.001 + 1e-30


# Other optimizers and other storages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ema", "exp_avg_sq", "masked"])
def test_adamw_of_torch_stops_at_codes(kind: str) -> None:
    model, optimizer = trained(kind, {"state_dtype": "8bit"})
    other = torch.optim.AdamW(model.named_parameters())
    other.load_state_dict(optimizer.state_dict())
    storing.give(named(model), 4)
    before = {name: param.detach().clone() for name, param in named(model).items()}
    with pytest.raises(KeyError, match="exp_avg"):
        other.step()
    assert all(torch.equal(param, before[name]) for name, param in named(model).items())


# how a state is kept -> the settings for it
KEPT: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"state_dtype": BFLOAT16},
    "8 bits": {"state_dtype": "8bit"},
    "24 bits": {"state_dtype": "8bit", "importance_dtype": BFLOAT16, "master_weight_bits": 24},
}


@pytest.mark.parametrize("kind", ["ema", "exp_avg_sq", "lion", "masked"])
def test_states_go_from_each_storage_into_each_other(kind: str) -> None:
    names = ["exp_avg"] if kind == "lion" else [*SLOTS]
    names += ["importance"] if kind in ("ema", "lion") else []
    for saved_as in ("float32", "bfloat16", "8 bits"):
        model, source = trained(kind, KEPT[saved_as])
        state = source.state_dict()
        for kept_as, settings in KEPT.items():
            other = model_of(SmallNet)
            optimizer = optimizer_of(kind, other, **settings)
            told = load(optimizer, state)
            same = saved_as == kept_as or ((saved_as, kept_as) == ("8 bits", "24 bits") and "importance" not in names)
            # moments of bfloat16 may be a framework's own, and lose nothing in float32
            silent = same or ((saved_as, kept_as) == ("bfloat16", "float32") and "importance" not in names)
            assert len(told) == (not silent), (saved_as, kept_as, told)
            for param, twin in zip(model.parameters(), other.parameters(), strict=True):
                one, two = source.state[param], optimizer.state[twin]
                for name in names:
                    old, new, kept = value(one, name), value(two, name), stored(two, name)[0]
                    if kept.dtype == torch.uint8:
                        off = torch.zeros_like(old) if same else half_a_step(old)
                        # a value too small for a code of its own gets the smallest one, if it must not become 0
                        smallest = block8._of_entries(block8._largest(old.abs()), old.shape) / block8.LARGEST**2
                        off = torch.maximum(off, smallest * 1.001) if name == "exp_avg_sq" else off
                        assert ((old - new).abs() <= off).all(), (saved_as, kept_as, name)
                    else:
                        assert torch.equal(new, old.to(kept.dtype).float()), (saved_as, kept_as, name)
                assert torch.equal(source.isolation_mask(param), optimizer.isolation_mask(twin)), (saved_as, kept_as)
            train(named(other), optimizer, 4, 4)


@pytest.mark.parametrize("kind", ["ema", "exp_avg_sq", "masked"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_states_of_torchs_adamw_go_into_each_storage(kind: str, amsgrad: bool) -> None:
    model = model_of(SmallNet).float()
    source = torch.optim.AdamW(model.named_parameters(), amsgrad=amsgrad)
    train(named(model), source, 1, 3)
    for kept_as, settings in KEPT.items():
        if amsgrad and settings.get("state_dtype") == "8bit":
            continue
        other = model_of(SmallNet)
        optimizer = optimizer_of(kind, other, **settings, amsgrad=amsgrad)
        assert len(load(optimizer, source.state_dict())) == (kept_as != "float32")
        for param, twin in zip(model.parameters(), other.parameters(), strict=True):
            one, two = source.state[param], optimizer.state[twin]
            assert int(two["step"]) == 3
            for name in (*SLOTS, "max_exp_avg_sq")[: 3 if amsgrad else 2]:
                kept = stored(two, name)[0]
                if kept.dtype != torch.uint8:
                    assert torch.equal(value(two, name), one[name].to(kept.dtype).float()), (kept_as, name)
        train(named(other), optimizer, 4, 4)


# What is refused -----------------------------------------------------------------------------------------------------


def assert_refuses(optimizer: Any, state: dict[str, Any], *texts: str) -> None:
    """Check that a load raises an error with these texts, and leaves the optimizer as it was."""
    before = storing.snapshot(optimizer)
    for text in texts:
        expect(ValueError, text, lambda: optimizer.load_state_dict(state))
    assert same_state(storing.snapshot(optimizer), before)


def changed(optimizer: Any, key: str, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Return an optimizer's state in which the tensors under one key are others."""
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        if key in entry:
            entry[key] = change(entry[key])
    return state


def test_scales_of_other_blocks_are_refused() -> None:
    _, optimizer = trained("ema", {"state_dtype": "8bit"})
    state = changed(optimizer, "exp_avg_sq_scales", lambda scales: scales[:, :1])
    assert_refuses(optimizer, state, "exp_avg_sq_scales of", "blocks of 8 bits have 64 entries of a row here")
    state = changed(optimizer, "exp_avg_codes", lambda codes: codes.float() + 0.5)
    assert_refuses(optimizer, state, "exp_avg_codes of", "a loader has cast it, and lost bits", "load_state_dict")
    state = changed(optimizer, "exp_avg_codes", lambda codes: codes.int() + 256)
    assert_refuses(optimizer, state, "exp_avg_codes of wide in the state: it is torch.int32")
    state = changed(optimizer, "importance_scales", Tensor.bfloat16)
    assert_refuses(optimizer, state, "importance_scales of wide in the state", "scales are float32")


@pytest.mark.parametrize(("bits", "other"), [(24, 32), (32, 24), (24, None), (32, None)])
@pytest.mark.parametrize("kind", ["ema", "sparse"])
def test_rests_of_other_bits_are_refused(kind: str, bits: int, other: int | None) -> None:
    _, source = trained(kind, {"master_weight_bits": bits})
    _, optimizer = trained(kind, {"master_weight_bits": other})
    state = source.state_dict()
    assert_refuses(optimizer, state, f"master_weight_bits={bits} in the state", f"with master_weight_bits={bits}")
    # a state whose groups say nothing of it
    for group in state["param_groups"]:
        del group["master_weight_bits"]
    assert_refuses(optimizer, state, f"Set master_weight_bits={bits}, or take 'rest' out of the state")


def test_a_rest_of_another_dtype_than_bfloat16_is_refused() -> None:
    _, source = trained("ema", {"master_weight_bits": 32})
    model = model_of(SmallNet)
    model.wide.data = model.wide.data.float()
    optimizer = optimizer_of("ema", model, master_weight_bits=32)
    assert_refuses(optimizer, source.state_dict(), "rest of wide is in the state, and the parameter is torch.float32")


@pytest.mark.parametrize("kind", ["ema", "exp_avg_sq", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16, torch.float16, torch.float64, torch.int32], ids=str)
def test_what_a_loader_has_cast_is_narrowed_where_no_bit_is_lost(kind: str, dtype: torch.dtype) -> None:
    for bits in (24, 32):
        model, source = trained(kind, {"state_dtype": "8bit", "master_weight_bits": bits})
        state = copy.deepcopy(source.state_dict())
        for entry in state["state"].values():
            entry.update({k: v.to(dtype) for k, v in entry.items() if k == "rest" or k.endswith("_codes")})
        other = copy.deepcopy(model)
        again = optimizer_of(kind, other, state_dtype="8bit", master_weight_bits=bits)
        assert load(again, state) == []
        for one, its in ((model, source), (other, again)):
            train(named(one), its, 4, 5)
        assert same_state(storing.contents(model, source), storing.contents(other, again))


# Resumed -------------------------------------------------------------------------------------------------------------

RESUMED = [
    ("ema", "24 bits, stochastic"),
    ("exp_avg_sq", "32 bits"),
    ("lion", "bfloat16"),
    ("masked", "8 bits"),
    ("sparse", "24 bits"),
]


def go_on(number: int, folder: Path, path: Path) -> None:
    """Load a run of each case, state or model first, take its other half, and write it, in a process of `forked`."""
    warnings.simplefilter("error")
    runs = torch.load(path, weights_only=True)
    for i, (kind, storage) in enumerate(RESUMED):
        saved = runs[i]
        model = model_of(SmallNet)
        optimizer = optimizer_of(kind, model, selects=False, **STORAGES[storage])
        loads = [
            lambda m=model, s=saved: m.load_state_dict(s["m"]),
            lambda o=optimizer, s=saved: o.load_state_dict(s["o"]),
        ]
        for one in loads if i % 2 else reversed(loads):
            one()
        train(named(model), optimizer, 6, 9)
        runs[i] = {"m": model.state_dict(), "o": optimizer.state_dict()}
    torch.save(runs, path)


def test_resumed_in_a_new_process_is_uninterrupted(tmp_path: Path) -> None:
    """In the middle of an interval."""
    runs = [trained(kind, STORAGES[storage], 5) for kind, storage in RESUMED]

    def saved() -> list[Any]:
        return [{"m": model.state_dict(), "o": optimizer.state_dict()} for model, optimizer in runs]

    torch.save(saved(), tmp_path / "runs.pt")
    forked.run(go_on, 1, tmp_path / "runs.pt")
    for model, optimizer in runs:
        train(named(model), optimizer, 6, 9)
    resumed = torch.load(tmp_path / "runs.pt", weights_only=True)
    for case, one, two in zip(RESUMED, saved(), resumed, strict=True):
        assert same_state(one, two), case


# Weights that a program writes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("how", ["data", "zeros", "copy_", "in place"])
def test_a_write_into_a_parameter_takes_hold(how: str, bits: int) -> None:
    """The weight is what was written, and the rest is at most half a unit of bfloat16."""
    model, optimizer = trained("ema", {"master_weight_bits": bits})
    written = torch.randn(model.up.weight.shape, generator=torch.Generator().manual_seed(9)).to(BFLOAT16)
    with torch.no_grad():
        if how == "data":
            model.up.weight.data = written.clone()
        elif how == "zeros":
            written = torch.zeros_like(written)
            model.up.weight.zero_()
        elif how == "copy_":
            model.up.weight.copy_(written)
        else:
            written = model.up.weight * 1.5
            model.up.weight.mul_(1.5)
    param = model.up.weight
    assert torch.equal(param, written)
    weight = split.joined(param.detach(), optimizer.state[param]["rest"])
    unit = torch.exp2(torch.floor(torch.log2(written.float().abs().clamp(min=2.0**-126))) - 7)
    assert ((weight - written.float()).abs() <= unit / 2).all()
    # a step of lr 0 leaves it there, and a step goes from there
    optimizer.param_groups[0]["lr"] = 0.0
    train(named(model), optimizer, 4, 4)
    assert torch.equal(param, written)
    optimizer.param_groups[0]["lr"] = 1e-3
    train(named(model), optimizer, 5, 5)
    moved = (split.joined(param.detach(), optimizer.state[param]["rest"]) - weight).abs()
    assert ((moved > 0) == ~optimizer.isolation_mask(param)).float().mean() > 0.95
    assert (moved <= 1.1e-2 + 0.01 * written.float().abs()).all()
