"""The life of a delta: applied, undone, combined. Everything is bit for bit, and what does not fit changes nothing.

- The trained model comes back from its base, and the base from the trained model.
- Another base, an entry that was overwritten since, and a chain that does not close are refused.
- Names do not depend on wrappers, tied parameters have all their names, unknown ones are answered with near ones.
- Checksums of shards and of deltas add up; every changed bit changes them.
- What any optimizer has changed since a snapshot is found by bits.
"""

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from states import same_state
from torch import Tensor, nn

from epi_kernels import EPIAdamW, EPILion, MaskedAdamW, SparseAdamW, delta, select
from epi_kernels.delta import Delta, since
from epi_kernels.delta.entries import bits_of, checksum, from_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128]


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


def selected(model: nn.Module, seed: int, share: float = 0.01) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(p.shape, generator=generator) < share * (p.dim() > 1) for n, p in model.named_parameters()}


def train(model: nn.Module, optimizer: SparseAdamW, steps: int = 3) -> None:
    for step in range(steps):
        model(torch.randn(8, 64, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def task(model: nn.Module, seed: int) -> Delta:
    """Train a task and return its delta."""
    optimizer = SparseAdamW(model.named_parameters(), lr=0.1, trainable=selected(model, seed))
    train(model, optimizer)
    return optimizer.delta()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def one(position: int, value: float, **about: Any) -> Delta:
    return Delta({"weight": (torch.tensor([position]), torch.tensor([value]))}, **about)


# Applied and undone ---------------------------------------------------------------------------------------------------


def test_tasks_one_after_the_other_come_back_bit_for_bit(tmp_path: Any) -> None:
    model = model_of()
    base = copy.deepcopy(model)
    optimizer = SparseAdamW(model.named_parameters(), lr=0.1, trainable={})
    for number in (1, 2):
        optimizer.select(selected(model, number))
        train(model, optimizer)
        delta.save(optimizer.delta(), tmp_path / f"{number}.safetensors")
    assert not same_state(state(base), state(model))
    for number in (1, 2):
        delta.apply(base, delta.load(tmp_path / f"{number}.safetensors"))
    assert same_state(state(base), state(model))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_undo_brings_back_every_bit_and_undoing_that_writes_the_delta_again(dtype: torch.dtype) -> None:
    model = nn.ParameterDict({"a": torch.randn(7, 5).to(dtype), "b": torch.randn(()).to(dtype)})
    with torch.no_grad():
        model["a"][0, :3] = torch.tensor([-0.0, float("nan"), float("inf")])
    columns = nn.Parameter(torch.randn(5, 7).to(dtype).t())  # its entries do not lie in row-major order
    model["c"] = columns
    before = state(model)
    given = {
        "a": (torch.tensor([1, 0, 34]), torch.tensor([-0.0, float("nan"), 3.0]).to(dtype)),
        "b": (torch.tensor([0]), torch.tensor([2.0]).to(dtype)),
        "c": (torch.tensor([1, 30]), torch.tensor([4.0, 5.0]).to(dtype)),
    }
    old = delta.apply(model, given)
    assert model["c"][0, 1] == 4.0
    assert model["c"][6, 0] == 5.0
    after = state(model)
    again = delta.undo(model, old)
    assert all(bitwise(tensor, before[name]) for name, tensor in state(model).items())
    delta.undo(model, again)
    assert all(bitwise(tensor, after[name]) for name, tensor in state(model).items())


def bitwise(one: Tensor, other: Tensor) -> bool:
    return torch.equal(bits_of(one.reshape(-1)), bits_of(other.reshape(-1)))


def test_undo_is_refused_where_an_entry_was_overwritten_and_changes_nothing() -> None:
    model = model_of()
    old = delta.apply(model, task(copy.deepcopy(model), 1))
    with torch.no_grad():
        model[1].weight.view(-1)[int(old["1.weight"][0][0])] += 1
    now = state(model)
    with pytest.raises(
        ValueError, match=r"1.weight has other values at the \d+ positions .* have been overwritten since"
    ):
        delta.undo(model, old)
    assert same_state(state(model), now)
    with pytest.raises(ValueError, match=r"0.weight has no checksum of the values that are to be replaced"):
        delta.undo(model, Delta(old))


def test_what_was_done_last_is_undone_first() -> None:
    model = model_of()
    base, olds = state(model), []
    whole = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in model.named_parameters()}
    for number in range(2):
        trained = copy.deepcopy(model)
        optimizer = SparseAdamW(trained.named_parameters(), lr=0.1, trainable=whole)
        train(trained, optimizer, 1 + number)
        olds.append(delta.apply(model, optimizer.delta()))
    with pytest.raises(ValueError, match="Undo what came later first"):
        delta.undo(model, olds[0])
    for old in reversed(olds):
        delta.undo(model, old)
    assert same_state(state(model), base)


def test_another_base_is_refused_only_where_the_delta_is() -> None:
    model = model_of()
    given = task(copy.deepcopy(model), 1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.view(-1)[int(given["0.weight"][0][3])] += 1
    now = state(other)
    with pytest.raises(ValueError, match="0.weight has other values .* than the model from which the delta was made"):
        delta.apply(other, given)
    assert same_state(state(other), now)
    delta.apply(other, dict(given))  # which knows nothing of a base
    elsewhere = copy.deepcopy(model)
    with torch.no_grad():
        elsewhere[0].bias += 1
    delta.apply(elsewhere, given)


def test_the_digest_of_the_whole_base_is_compared_on_request() -> None:
    model = model_of()
    given = task(copy.deepcopy(model), 1)
    with pytest.raises(ValueError, match=r"the delta has no digest of its base; set delta.base = digest\(model\)"):
        delta.apply(copy.deepcopy(model), given, digest=True)
    given.base = delta.digest(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].bias[0] += 1
    now = state(other)
    with pytest.raises(ValueError, match=f"digest is {delta.digest(other)} and that of the delta's base {given.base}"):
        delta.apply(other, given, digest=True)
    assert same_state(state(other), now)
    old = delta.apply(model, given, digest=True)
    assert (old.base, old.target) == (given.target, given.base)
    old.base = delta.digest(model)
    delta.undo(model, old, digest=True)
    assert delta.digest(model) == given.base


def test_the_checksum_is_of_what_the_entries_were_before_the_first_step() -> None:
    model = model_of()
    optimizer = SparseAdamW(model.named_parameters(), lr=0.1, trainable=selected(model, 1))
    with torch.no_grad():
        model[0].weight.zero_()  # weights that are loaded after the optimizer was made
    base = copy.deepcopy(model)
    train(model, optimizer)
    between = copy.deepcopy(optimizer)
    train(model, optimizer)
    assert optimizer.delta().before == between.delta().before
    delta.apply(base, optimizer.delta())
    assert same_state(state(base), state(model))
    # a state that was saved in the middle does not say what there was at the start
    resumed = SparseAdamW(model.named_parameters(), lr=0.1, trainable={})
    resumed.load_state_dict(optimizer.state_dict())
    train(model, resumed)
    assert resumed.delta().keys() == optimizer.delta().keys()
    assert resumed.delta().before == {}


def test_a_delta_that_does_not_fit_changes_nothing() -> None:
    model = nn.Linear(2, 2)
    before = state(model)
    good = (torch.tensor([0]), torch.tensor([9.0]))
    for given, message in (
        ({"weight": good, "head": good}, "the delta has head, which the model has not; it has weight, bias"),
        ({"weight": good, "wieght": good}, "the nearest names are weight"),
        ({"weight": good, "bias": (torch.tensor([2]), good[1])}, "positions from 2 to 2 in bias, which has 2"),
        ({"weight": good, "bias": (torch.tensor([-1, 0]), torch.ones(2))}, "positions from -1 to 0 in bias, which has"),
        ({"weight": good, "bias": (torch.tensor([0.0]), good[1])}, "bias has positions of torch.float32"),
        ({"weight": good, "bias": (torch.tensor([True]), good[1])}, "bias has positions of torch.bool"),
        ({"weight": good, "bias": (torch.tensor([1, 1]), torch.ones(2))}, "the delta has positions of bias twice"),
        ({"weight": good, "bias": (torch.tensor([0, 1]), good[1])}, r"positions of shape \(2,\) and values of"),
        ({"weight": good, "bias": (good[0], good[1].half())}, "bias is torch.float32 in the model and torch.float16"),
        (Delta({"weight": good}, shapes={"weight": (4, 1)}), r"has shape \(2, 2\) in the model and \(4, 1\) in the"),
        ({"weight": good, "module.weight": good}, "weight and module.weight, which are one parameter of the model"),
    ):
        with pytest.raises(ValueError, match=message):
            delta.apply(model, given)
        assert same_state(state(model), before)


def test_values_are_converted_on_request_alone() -> None:
    model = nn.Linear(2, 2).bfloat16()
    given = one(3, 1.001)
    with pytest.raises(
        ValueError, match="weight is torch.bfloat16 in the model and torch.float32 .*; convert=True rounds"
    ):
        delta.apply(model, given)
    base = state(model)
    old = delta.apply(model, given, convert=True)
    assert model.weight[1, 1] == 1.0
    delta.undo(model, old)
    assert same_state(state(model), base)
    with pytest.raises(ValueError, match="is torch.bfloat16 in the model and torch.complex64 .*; convert one of them"):
        delta.apply(model, {"weight": (torch.tensor([0]), torch.ones(1, dtype=torch.complex64))}, convert=True)


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap", [torch.compile, lambda model: nn.ModuleDict({"module": model})], ids=["compile", "DDP"]
)
@pytest.mark.parametrize("which", ["the trained model", "the base"])
def test_wrappers_do_not_separate_a_delta_from_its_model(wrap: Callable[[nn.Module], nn.Module], which: str) -> None:
    model, base = model_of(), model_of()
    trained = wrap(model) if which == "the trained model" else model
    optimizer = SparseAdamW(trained.named_parameters(), lr=0.1, trainable=selected(trained, 1))
    train(model, optimizer)
    old = delta.apply(wrap(base) if which == "the base" else base, optimizer.delta())
    assert same_state(state(base), state(model))
    delta.undo(base, old)
    assert same_state(state(base), state(model_of()))


class Tied(nn.Module):
    """An embedding whose weight is the head's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_a_tied_parameter_goes_by_each_of_its_names(name: str) -> None:
    model, entries = Tied(), (torch.tensor([5]), torch.tensor([7.0]))
    before = state(model)
    old = delta.apply(model, {name: entries})
    assert model.embed.weight[1, 1] == model.head.weight[1, 1] == 7.0
    delta.undo(model, old)
    assert same_state(state(model), before)
    with pytest.raises(ValueError, match=r"embed.weight and head.weight, which are one parameter of the model, tied"):
        delta.apply(model, {"embed.weight": entries, "head.weight": entries})
    assert same_state(state(model), before)


def test_a_delta_is_renamed_for_a_model_with_other_names() -> None:
    model = model_of()
    given = task(copy.deepcopy(model), 1)
    outer = nn.ModuleDict({"body": model})
    for names in ({"0.": "body.0.", "1.weight": "body.1.weight"}, lambda name: f"body.{name}"):
        renamed = delta.rename(given, names)
        assert list(renamed) == ["body.0.weight", "body.1.weight"]
        delta.undo(outer, delta.apply(outer, renamed))
        assert renamed.before["body.0.weight"] == given.before["0.weight"]
    with pytest.raises(ValueError, match=r"'2.' is to be renamed, and the delta has no such name"):
        delta.rename(given, {"2.": "3."})
    with pytest.raises(ValueError, match="two parameters would have the name weight"):
        delta.rename(given, lambda name: "weight")


def test_an_unknown_name_is_answered_with_the_nearest_ones_and_not_with_all() -> None:
    model = nn.ModuleDict({f"layer{i}": nn.Linear(2, 2) for i in range(50)})
    with pytest.raises(ValueError, match=r"the delta has layr7.weight, which the model has not; the nearest") as found:
        delta.apply(model, {"layr7.weight": (torch.tensor([0]), torch.ones(1))})
    assert "layer7.weight" in str(found.value)
    assert str(found.value).count("weight") == 4
    assert "rename" in str(found.value)


# Combined -------------------------------------------------------------------------------------------------------------


def test_tasks_one_after_the_other_are_one_delta() -> None:
    model = model_of()
    base, after = copy.deepcopy(model), []
    for seed in (1, 2, 3):
        after.append(task(model, seed))
    shared = set(after[0]["0.weight"][0].tolist()) & set(after[1]["0.weight"][0].tolist())
    whole = delta.combine(after, consecutive=True)
    assert whole.conflicts == {}
    old = delta.apply(base, whole)
    assert same_state(state(base), state(model))
    delta.undo(base, old)
    assert same_state(state(base), state(model_of()))
    assert whole.before.keys() == {"0.weight", "1.weight"}
    with torch.no_grad():
        base[0].weight.view(-1)[(shared or after[0]["0.weight"][0].tolist()).pop()] += 1
    with pytest.raises(ValueError, match="0.weight has other values"):
        delta.apply(base, whole)


def test_combine_takes_the_last_of_values_that_conflict_and_counts_and_names_them() -> None:
    first = Delta(
        {"a": (torch.tensor([0, 4, 9]), torch.tensor([1.0, 2.0, 3.0])), "b": (torch.tensor([1]), torch.tensor([1.0]))},
        before={"a": 5, "b": 6},
    )
    other = Delta({"module.a": (torch.tensor([9, 3, 4]), torch.tensor([7.0, 8.0, 2.0]))}, before={"module.a": 1})
    other["c"] = (torch.tensor([2]), torch.tensor([5.0]))
    other.before["c"] = 9
    both = delta.combine([first, other])
    assert both["a"][0].tolist() == [0, 3, 4, 9]
    assert both["a"][1].tolist() == [1.0, 8.0, 2.0, 7.0]
    assert both.conflicts == {"a": 1}  # at 4 both have the same value
    assert both.before == {"b": 6, "c": 9}
    assert both.keys() == {"a", "b", "c"}


@pytest.mark.parametrize("kind", ["a model", "tensors", "a checkpoint"])
def test_combined_deltas_are_compared_with_the_base_on_request(kind: str, tmp_path: Any) -> None:
    base = model_of()
    save_file(state(base), tmp_path / "model.safetensors")
    given: Any = {"a model": base, "tensors": state(base), "a checkpoint": tmp_path}[kind]
    tasks = [task(copy.deepcopy(base), seed) for seed in (1, 2)]
    tasks.append(Delta(tasks[0], before=tasks[0].before))  # which shares all positions with the first
    whole = delta.combine(tasks, base=given)
    assert whole.before.keys() == whole.keys()
    delta.undo(base, delta.apply(base, whole))
    assert delta.combine(tasks[:1], base=given).before == tasks[0].before
    two = [tasks[0], task(model_of(1), 2)]
    with pytest.raises(ValueError, match="0.weight has other values .* than the base that was given"):
        delta.combine(two, base=given)
    delta.combine(two, base=given, consecutive=True)  # the other one did not begin with the base
    with pytest.raises(ValueError, match="the delta has head, which the base has not"):
        delta.combine([{"head": (torch.tensor([0]), torch.ones(1))}], base=given)
    with pytest.raises(ValueError, match="0.bias is torch.float32 in the base and torch.float16"):
        delta.combine([{"0.bias": (torch.tensor([0]), torch.ones(1).half())}], base=given)


def test_a_chain_that_does_not_close_is_refused() -> None:
    steps = [one(0, 1.0, base="A", target="B"), one(1, 2.0, base="B", target="C"), one(2, 3.0, base="A", target="D")]
    chain = delta.combine(steps[:2], consecutive=True)
    assert (chain.base, chain.target) == ("A", "C")
    with pytest.raises(ValueError, match="delta 1 begins with the model A, and the one before ends with B"):
        delta.combine([steps[0], steps[2]], consecutive=True)
    with pytest.raises(ValueError, match="delta 1 begins with the model B, and the first begins with A"):
        delta.combine(steps[:2])
    apart = delta.combine([steps[0], steps[2]])
    assert (apart.base, apart.target) == ("A", None)
    for others, message in (
        ([], "there are no deltas"),
        ([one(0, 1.0), Delta({"weight": (torch.tensor([0]), torch.ones(1).half())})], "torch.float32 .* torch.float16"),
        ([one(0, 1.0, shapes={"weight": (2,)}), one(0, 1.0, shapes={"weight": (3,)})], r"\(2,\) .* \(3,\)"),
        ([{"weight": (torch.tensor([1, 1]), torch.ones(2))}], "positions of weight twice"),
    ):
        with pytest.raises(ValueError, match=message):
            delta.combine(others)


# Checksums ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn], ids=str)
def test_every_bit_of_a_value_and_of_a_position_changes_the_checksum(dtype: torch.dtype) -> None:
    positions, values = torch.tensor([3, 1 << 40, 77]), torch.randn(3).to(dtype)
    assert torch.equal(bits_of(from_bits(bits_of(values), dtype)), bits_of(values))
    seen = {int(checksum(positions, values))}
    for bit in range(40):
        seen.add(int(checksum(positions ^ torch.tensor([0, 1 << bit, 0]), values)))
    raw = torch.view_as_real(values) if dtype.is_complex else values
    for bit in range(8 * dtype.itemsize):
        changed = raw.clone()
        flat = changed.view(torch.uint8).reshape(-1)
        flat[bit // 8] ^= 1 << bit % 8
        seen.add(int(checksum(positions, torch.view_as_complex(changed) if dtype.is_complex else changed)))
    assert len(seen) == 41 + 8 * dtype.itemsize
    swapped = values[[1, 0, 2]]
    assert int(checksum(positions, swapped)) not in seen
    assert int(checksum(positions[[1, 0, 2]], swapped)) == int(checksum(positions, values))


def test_checksums_of_parts_add_up() -> None:
    positions, values = torch.randperm(200_000), torch.randn(200_000)
    parts = [checksum(positions[part], values[part]) for part in (slice(0, 7), slice(7, 100_001), slice(100_001, None))]
    assert torch.equal(torch.stack(parts).sum(), checksum(positions, values))


def test_the_digest_knows_names_shapes_dtypes_and_values_and_no_wrappers() -> None:
    model = model_of()
    seen = {delta.digest(model)}
    assert delta.digest(torch.compile(model)) in seen
    assert delta.digest(dict(model.named_parameters())) in seen
    changed: list[Mapping[str, Tensor]] = []
    for change in (lambda t: t.flip(0), lambda t: t.reshape(-1), lambda t: t.bfloat16()):
        changed.append({n: change(p.detach()) if n == "0.weight" else p for n, p in model.named_parameters()})
    changed.append({n.replace("0.", "2."): p for n, p in model.named_parameters()})
    assert len({*seen, *map(delta.digest, changed)}) == 5


def test_a_delta_keeps_what_it_belongs_to_in_copies() -> None:
    given = one(0, 1.0, shapes={"weight": (1,)}, before={"weight": 3}, base="A", target="B", conflicts={"weight": 1})
    for copied in (copy.deepcopy(given), copy.copy(given), pickle.loads(pickle.dumps(given))):
        assert vars(copied) == vars(given)
        assert copied["weight"][1] == 1.0


# Gradients ------------------------------------------------------------------------------------------------------------


def test_parameters_without_a_selected_entry_need_no_gradient() -> None:
    model = model_of()
    masks = selected(model, 1)
    masks["1.weight"] = torch.zeros(64, 64, dtype=torch.bool)
    del masks["1.bias"]
    assert select.freeze_unselected(model, masks) == ["0.bias", "1.weight", "1.bias"]
    assert [name for name, param in model.named_parameters() if param.requires_grad] == ["0.weight"]
    model(torch.randn(8, 64)).sum().backward()
    assert model[0].weight.grad is not None
    with pytest.raises(
        ValueError, match="masks have 0.wieght, which the model has not; the nearest names are 0.weight"
    ):
        select.freeze_unselected(model, {"0.wieght": masks["0.weight"]})


# Since a snapshot -----------------------------------------------------------------------------------------------------


def optimizers(model: nn.Module) -> dict[str, Any]:
    named = list(model.named_parameters())
    frozen = {name: torch.arange(param.numel()).view(param.shape) % 2 == 0 for name, param in named}
    return {
        "EPIAdamW": EPIAdamW(named, lr=0.1, isolation_ratio=0.3, mask_interval=1),
        "EPILion": EPILion(named, lr=0.1, isolation_ratio=0.3, mask_interval=1),
        "MaskedAdamW": MaskedAdamW(named, lr=0.1, frozen=frozen),
    }


@pytest.mark.parametrize("base", ["a snapshot", "a model", "a checkpoint"])
@pytest.mark.parametrize("kind", ["EPIAdamW", "EPILion", "MaskedAdamW"])
def test_what_was_changed_since_brings_a_server_up_to_date(kind: str, base: str, tmp_path: Any) -> None:
    model = model_of().bfloat16()
    server = copy.deepcopy(model)
    optimizer = optimizers(model)[kind]
    for update in range(3):
        held: Any = copy.deepcopy(server)
        if base == "a snapshot":
            held = state(server)
        elif base == "a checkpoint":
            held = tmp_path / f"{update}.safetensors"
            save_file(state(server), held)
        model(torch.randn(8, 64).bfloat16()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        found = optimizer.delta_since(held)
        # masks are chosen at the beginning of a step
        protected = [optimizer.isolation_mask(param) for param in model.parameters()]
        for mask, (name, old) in zip(protected, server.named_parameters(), strict=True):
            differ = (model.get_parameter(name) != old).flatten().nonzero()[:, 0]
            assert torch.equal(found[name][0].long(), differ)
            assert not mask.flatten()[differ].any()
        delta.apply(server, found)
        assert same_state(state(server), state(model))
    assert optimizer.delta_since(server) == {}


def test_bits_are_compared_and_not_values() -> None:
    model = nn.ParameterDict({"w": torch.tensor([0.0, torch.nan, 1.0])})
    snapshot = {"w": torch.tensor([-0.0, torch.nan, 1.0])}
    assert since.changes(model.named_parameters(), snapshot)["w"][0].tolist() == [0]
    double = nn.ParameterDict({"w": torch.zeros(3, 2, dtype=torch.complex128)})
    snapshot = {"w": torch.zeros(3, 2, dtype=torch.complex128)}
    snapshot["w"][2, 0] = 1j
    assert since.changes(double.named_parameters(), snapshot)["w"][0].tolist() == [4]


def test_a_base_that_does_not_fit_is_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = EPIAdamW(model.named_parameters())
    for base, message in (
        ({"weight": model.weight}, "the optimizer has bias, which the base has not"),
        ({**state(model), "bias": torch.ones(3)}, r"bias has shape \(2,\), and \(3,\) in the base"),
        ({**state(model), "bias": torch.ones(2).half()}, "bias is torch.float32 in the model and torch.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.delta_since(base)
    with pytest.raises(ValueError, match=r"the optimizer has none; pass it model.named_parameters\(\)"):
        EPIAdamW(model.parameters(), layers="tensor").delta_since(state(model))
