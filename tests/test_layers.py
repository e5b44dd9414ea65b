"""The layer of a parameter: its transformer block, else its module; wrappers do not change it."""

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from epi_kernels.isolation.layers import Grouping, block, check_saved


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3"),
        ("model.layers.30.mlp.0.weight", "model.layers.30"),
        ("encoder.block.0.layer.1.weight", "encoder.block.0"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("lm_head.bias", "lm_head"),
        ("0.weight", "0"),
        ("stage2.conv1.weight", "stage2.conv1"),
        ("scale", ""),
        ("module._orig_mod.h.2._fsdp_wrapped_module.attn.weight", "h.2"),
    ],
)
def test_block(name: str, layer: str) -> None:
    assert block(name) == layer


def layers(grouping: Grouping, *names: str) -> list[str]:
    params = [Parameter(torch.ones(1)) for _ in names]
    return list(grouping.of([{"params": params, "param_names": list(names)}]).values())


def test_tensor_is_the_name_without_wrappers() -> None:
    assert layers(Grouping("tensor"), "module.h.2.weight", "h.2.bias") == ["h.2.weight", "h.2.bias"]


def test_a_callable_decides_for_itself() -> None:
    assert layers(Grouping(lambda name: name[0]), "weight", "bias", "width") == ["w", "b", "w"]


def test_a_parameter_with_two_names_has_the_layer_of_the_first() -> None:
    tied = Parameter(torch.ones(1))
    groups = [{"params": [tied, tied], "param_names": ["embed.weight", "head.weight"]}]
    assert Grouping("block").of(groups) == {tied: "embed"}


def stamped(grouping: Grouping, *names: str) -> list[dict[str, Any]]:
    groups = [{"params": [Parameter(torch.ones(1)) for _ in names], "param_names": list(names)}]
    grouping.stamp(groups)
    return groups


def test_the_stamp_tells_groupings_apart_and_not_names() -> None:
    names = ("h.0.a", "h.0.b", "h.1.a")
    saved = stamped(Grouping("block"), *names)
    check_saved(saved, stamped(Grouping("block"), *(f"model.{name}" for name in names)))
    check_saved(saved, stamped(Grouping(block), *names))
    check_saved([{"params": [0, 1, 2]}], saved)  # a state of torch.optim.AdamW
    with pytest.raises(ValueError, match="layers='block' and this optimizer has layers='tensor'"):
        check_saved(saved, stamped(Grouping("tensor"), *names))
