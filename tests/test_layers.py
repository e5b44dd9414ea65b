"""The layer of a parameter: its transformer block, else its module; wrappers do not change it."""

import pytest

from epi_kernels.layers import block, digest, layer_of


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


def test_tensor_is_the_name_without_wrappers() -> None:
    assert layer_of("tensor", "module.h.2.weight") == "h.2.weight"


def test_a_callable_decides_for_itself() -> None:
    assert layer_of(lambda name: name[0], "weight") == "w"


def test_digest_tells_groupings_apart() -> None:
    assert digest(["0", "0", "1"]) == digest(iter(["0", "0", "1"])) != digest(["0", "1", "1"])
