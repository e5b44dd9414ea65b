"""Bad input loses nothing: it raises by name and value, before anything has changed."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from epi_kernels import EPIAdamW


def named(*names: str) -> list[tuple[str, Parameter]]:
    return [(name, Parameter(torch.ones(4))) for name in names or ("w",)]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("isolation_ratio", -0.1),
        ("isolation_ratio", 1.0),
        ("isolation_ratio", math.nan),
        ("isolation_ratio", "1%"),
        ("importance_beta", -0.5),
        ("importance_beta", 1.0),
        ("importance_beta", math.nan),
        ("mask_interval", 0),
        ("mask_interval", -3),
        ("mask_interval", 2.5),
        ("mask_interval", True),
        ("layers", "blocks"),
        ("layers", 3),
        ("normalize", "batch"),
        ("scope", "block"),
        ("threshold", "quantile"),
        ("importance", "fisher"),
        ("backend", "cublas"),
    ],
)
def test_every_argument_of_ours_is_checked_by_name_and_value(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"Invalid {argument}: {value!r}"):
        EPIAdamW(named(), **{argument: value})


@pytest.mark.parametrize(
    "arguments",
    [{"lr": -1.0}, {"eps": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -1.0)}, {"weight_decay": -1.0}],
    ids=str,
)
def test_torchs_own_arguments_raise_as_torchs_class_does(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as theirs:  # noqa: PT011  the message is what is compared
        torch.optim.AdamW([Parameter(torch.ones(1))], **arguments)
    with pytest.raises(ValueError) as ours:  # noqa: PT011
        EPIAdamW(named(), **arguments)
    assert str(ours.value) == str(theirs.value)


def test_a_group_is_checked_and_a_bad_one_is_not_added() -> None:
    optimizer = EPIAdamW(named("a"))
    with pytest.raises(ValueError, match="Invalid isolation_ratio: 2"):
        optimizer.add_param_group({"params": named("b"), "isolation_ratio": 2})
    with pytest.raises(ValueError, match="mask_interval=7 in a parameter group; the optimizer has 500"):
        optimizer.add_param_group({"params": named("b"), "mask_interval": 7})
    with pytest.raises(NotImplementedError, match="b is torch.int64"):
        optimizer.add_param_group({"params": [("b", torch.ones(2, dtype=torch.int64))]})
    for argument, value, text in (
        ("lr", -5.0, "Invalid learning rate: -5.0"),
        ("eps", -1.0, "Invalid epsilon value: -1.0"),
        ("betas", (0.9, 1.0), "Invalid beta parameter at index 1: 1.0"),
        ("weight_decay", -1.0, "Invalid weight_decay value: -1.0"),
    ):
        with pytest.raises(ValueError, match=text):
            optimizer.add_param_group({"params": named("b"), argument: value})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradient_raises_torchs_error_and_changes_nothing() -> None:
    dense, table = Parameter(torch.ones(4)), torch.nn.Embedding(4, 2, sparse=True)
    optimizer = EPIAdamW([("dense", dense), ("table", table.weight)], mask_interval=1)
    dense.grad = torch.ones(4)
    table(torch.tensor([1])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match="Adam does not support sparse gradients, please consider SparseAdam"):
        optimizer.step()
    assert not optimizer.state
    assert dense.tolist() == [1.0] * 4
    assert torch.equal(table.weight, before)


def test_gradient_that_does_not_fit_raises_and_changes_nothing() -> None:
    first, second = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    optimizer = EPIAdamW([("first", first), ("second", second)])
    first.grad = second.grad = torch.ones(4)
    second.data = torch.ones(5)
    with pytest.raises(ValueError, match=r"grads\[1\] has shape \(4,\) but params\[1\] has \(5,\)"):
        optimizer.step()
    assert not optimizer.state
    assert first.tolist() == [1.0] * 4


def test_without_names_a_tensor_is_a_layer_and_one_warning_says_so() -> None:
    with pytest.warns(UserWarning, match=r"named_parameters\(\)") as caught:
        optimizer = EPIAdamW([p for _, p in named("a", "b")])
    assert len(caught) == 1
    assert "2 tensors in 2 layers by 'tensor'" in repr(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EPIAdamW([p for _, p in named("a", "b")], layers="tensor")


@pytest.mark.parametrize("layers", ["block", lambda name: name], ids=["block", "callable"])
def test_a_grouping_by_names_needs_names(layers: Any) -> None:
    with pytest.raises(ValueError, match=r"pass model.named_parameters\(\)"):
        EPIAdamW([Parameter(torch.ones(1))], layers=layers)


def test_the_grouping_in_force_is_printed() -> None:
    names = ("embed.weight", "h.0.a", "h.0.b", "h.1.a", "head.weight")
    assert "5 tensors in 4 layers by 'block'; backend reference on cpu" in repr(
        EPIAdamW(named(*names), backend="reference")
    )
    assert "5 tensors in 1 layers by 'callable'" in repr(EPIAdamW(named(*names), layers=lambda name: "all"))


def test_a_stranger_has_no_mask() -> None:
    with pytest.raises(ValueError, match=r"shape \(2,\) is not a parameter of this optimizer"):
        EPIAdamW(named()).isolation_mask(torch.ones(2))
