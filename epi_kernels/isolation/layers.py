"""Which entries are normalised together: the layer of each parameter.

The paper (EPI, arXiv 2604.14010, Eq. 7) says "the l-th layer" and means the transformer block. It matters which: masks
by block and masks by tensor have a Jaccard overlap of about 0.25.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor

from epi_kernels.engine.groups import has_names, without_wrappers
from epi_kernels.notices import warn

LayersArgument = Literal["auto", "block", "tensor"] | Callable[[str], str]

GROUPINGS = ("auto", "block", "tensor")

# how to give an optimizer names; a Trainer hands it tensors alone
_NAMED = (
    "pass model.named_parameters(), or in a transformers Trainer use optimizer_cls_and_kwargs of "
    "epi_kernels.integrations.transformers"
)

# what `Grouping.stamp` writes into a group
STAMPED = ("layers", "layers_auto", "layer_digest")


def block(name: str) -> str:
    """Return the layer of a parameter: its transformer block, or its module if it is in no block.

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


class Grouping:
    """The layers of an optimizer's parameters.

    Args:
        layers: "block", "tensor", a callable name -> layer, or "auto", which `resolve` decides.

    Raises:
        ValueError: `layers` is none of these.
    """

    def __init__(self, layers: LayersArgument) -> None:
        if layers not in GROUPINGS and not callable(layers):
            raise ValueError(f"Invalid layers: {layers!r}; choose one of {GROUPINGS} or pass a callable name -> layer")
        self.layers = layers
        self.auto = layers == "auto"

    @property
    def name(self) -> str:
        """The grouping in force: "block", "tensor", "callable", or "auto" before `resolve`."""
        return self.layers if isinstance(self.layers, str) else "callable"

    def resolve(self, named: bool) -> None:
        """Replace "auto" by a grouping, once it is known whether parameters have names.

        Raises:
            ValueError: the grouping needs names, and parameters have none.
        """
        if named:
            self.layers = "block" if self.layers == "auto" else self.layers
        elif self.layers == "auto":
            self.layers = "tensor"
            warn(
                "the optimizer was given no parameter names: each tensor is a layer of its own. For the paper's layers "
                f"(transformer blocks) {_NAMED}; to keep this, layers='tensor'."
            )
        elif self.layers != "tensor":
            raise ValueError(
                f"layers={self.layers!r} goes by parameter names, and the optimizer was given none; {_NAMED}"
            )

    def of(self, groups: Sequence[dict[str, Any]]) -> dict[Tensor, str]:
        """Return the layer of every parameter of torch's parameter groups, in their order."""
        layers: dict[Tensor, str] = {}
        for i, group in enumerate(groups):
            named = has_names(group)
            for j, param in enumerate(group["params"]):
                name = str(group["param_names"][j]) if named else f"{i}.{j}"  # torch takes any name
                layers.setdefault(param, self.layer(name))
        return layers

    def layer(self, name: str) -> str:
        """Return the layer of a parameter of this name."""
        if self.layers == "block":
            return block(name)
        if self.layers == "tensor":
            return without_wrappers(name)
        assert callable(self.layers)
        return str(self.layers(name))

    def stamp(self, groups: Sequence[dict[str, Any]]) -> None:
        """Write the grouping into the groups, where a checkpoint carries it.

        The keys are ``layers``, the name of the grouping; ``layers_auto``, whether "auto" chose the grouping; and
        ``layer_digest``, which encodes which parameters share a layer. The digest is made of positions, so renaming a
        module does not change it.
        """
        if not all(has_names(group) or "param_names" not in group for group in groups):
            return  # DeepSpeed has replaced the named parameters by flat partitions: the old stamp stays
        layers = self.of(groups)
        index = {layer: str(i) for i, layer in enumerate(dict.fromkeys(layers.values()))}
        for group in groups:
            members = ",".join(index[layers[param]] for param in group["params"])
            group["layers"], group["layers_auto"] = self.name, self.auto
            group["layer_digest"] = hashlib.sha256(members.encode()).hexdigest()[:16]

    def adopt(self, groups: Sequence[dict[str, Any]]) -> None:
        """Stamp groups into which a state was loaded; `check_saved` has passed that state.

        If "auto" has chosen one grouping for the state and another here, parameters have names on only one side. If the
        names came with the state, they are in the groups now, and "auto" chooses as it did for the state; if this
        optimizer had the names, its grouping stays. A warning says which.
        """
        saved_name, before = groups[0].get("layers"), self.layers
        saved = [group.get("layer_digest") for group in groups]

        def as_saved() -> bool:
            return all(one in (None, group["layer_digest"]) for one, group in zip(saved, groups, strict=True))

        self.stamp(groups)
        if as_saved() or not self.auto:
            return
        self.layers = "block" if all(map(has_names, groups)) else "tensor"
        self.stamp(groups)
        if as_saved():
            warn(
                f"the state has the names of the parameters, which this optimizer had not: its layers are by "
                f"{self.name!r} now, as in the state, and no longer by {before!r}"
            )
        else:
            warn(
                f"the state was saved with layers by {saved_name!r}, and this optimizer has them by {self.name!r}: "
                "the masks are the state's until the next refresh, which chooses by the layers here"
            )


def check_saved(saved_groups: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]) -> None:
    """Check that a saved state was made under the grouping of `groups`; a state without a stamp passes.

    A state also passes if "auto" chose another grouping for it than here, because only one of the two had names: as
    with torch, a state with names loads into an optimizer without them, and the reverse (see `Grouping.adopt`).

    Raises:
        ValueError: the parameters fall into other layers than in the state, so the masks would not be comparable.
    """
    for i, (saved, ours) in enumerate(zip(saved_groups, groups, strict=False)):
        for key in ("layers", "layer_digest"):
            if not isinstance(saved.get(key, ""), str):
                raise ValueError(f"parameter group {i} of the state: {key} is a {type(saved[key]).__name__}, not a str")
        both_auto = saved.get("layers_auto") is True is ours["layers_auto"]
        if both_auto and saved.get("layers") != ours["layers"]:
            continue
        if saved.get("layer_digest", ours["layer_digest"]) != ours["layer_digest"]:
            raise ValueError(
                f"the state was saved with layers={saved.get('layers')!r} and this optimizer has layers="
                f"{ours['layers']!r}: parameter group {i} falls into other layers, and the masks would not compare; "
                f"construct the optimizer with layers={saved.get('layers')!r} and the parameter names it had"
            )
