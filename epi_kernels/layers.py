"""Which entries are normalised together: the layer of each parameter.

The paper (EPI, arXiv 2604.14010, Eq. 7) says "the l-th layer" and means the transformer block. It matters: masks by
block and by tensor agree to a Jaccard overlap of about 0.25.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import Literal

LayersArgument = Literal["auto", "block", "tensor"] | Callable[[str], str]

GROUPINGS = ("auto", "block", "tensor")

# what wrappers put into a parameter's name: the layer must not depend on how a model is wrapped
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def block(name: str) -> str:
    """Return the layer of a parameter: its transformer block, or its module where it is in none.

    The block is everything up to the first component of the dotted name that is a number.

    Example:
        >>> block("model.layers.3.self_attn.q_proj.weight"), block("model.embed_tokens.weight"), block("scale")
        ('model.layers.3', 'model.embed_tokens', '')
    """
    components = without_wrappers(name).split(".")
    for i, component in enumerate(components):
        if component.isdecimal():
            return ".".join(components[: i + 1])
    return ".".join(components[:-1])


def without_wrappers(name: str) -> str:
    """Return a parameter's name as the bare model has it, without the components that wrappers add.

    Example:
        >>> without_wrappers("module._orig_mod.head.weight")
        'head.weight'
    """
    # only leading and inner components: a module that is itself called "module" at the end keeps its name
    *path, last = name.split(".")
    return ".".join([component for component in path if component not in _WRAPPERS] + [last])


def check_layers(layers: object) -> None:
    """Check a `layers` argument.

    Raises:
        ValueError: it is neither one of GROUPINGS nor callable.
    """
    if layers not in GROUPINGS and not callable(layers):
        raise ValueError(f"Invalid layers: {layers!r}; choose one of {GROUPINGS} or pass a callable name -> layer")


def layer_of(layers: LayersArgument, name: str) -> str:
    """Return the layer of the parameter `name` under a grouping that is not "auto"."""
    if layers == "block":
        return block(name)
    if layers == "tensor":
        return without_wrappers(name)
    assert callable(layers)
    return str(layers(name))


def digest(layers: Iterable[str]) -> str:
    """Return 16 hexadecimal digits that stand for the layers of a list of parameters, in their order."""
    return hashlib.sha256("\n".join(layers).encode()).hexdigest()[:16]
