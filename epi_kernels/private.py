"""The names of torch without a promise on which this package stands, each with its reason.

A new torch may drop any of them. `missing` says which it has dropped; tests/test_private.py fails then, names it, and
says what it was for. The test also finds every use of such a name in the package, so that this list is complete.
"""

import importlib
from typing import NamedTuple


class Private(NamedTuple):
    """A private name of torch.

    Attributes:
        name: as the package uses it.
        where: where it is: a module, a class as "module:Class", or "instance" of what only a run makes.
        reason: what the package needs it for, and why no public name does the same.
    """

    name: str
    where: str
    reason: str


PRIVATE = (
    Private(
        "_accelerator_graph_capture_health_check",
        "torch.optim.optimizer:Optimizer",
        "complains, in torch's words, of a capture that the flags of the groups do not allow",
    ),
    Private(
        "_step_supports_amp_scaling",
        "instance",
        "tells torch.amp.GradScaler that the step divides by the scale; torch's own fused optimizers set it",
    ),
    Private(
        "_optimizer_state_dict_pre_hooks", "instance", "IsolatedOptimizer runs the hooks of its own, not its base's"
    ),
    Private("_optimizer_state_dict_post_hooks", "instance", "as above"),
    Private("_optimizer_load_state_dict_pre_hooks", "instance", "as above"),
    Private("_optimizer_load_state_dict_post_hooks", "instance", "as above"),
    Private(
        "_device_dtype_check_for_fused",
        "torch.optim.optimizer",
        "the check of a parameter under fused=True, with torch's text",
    ),
    Private(
        "_get_capturable_supported_devices",
        "torch.optim.optimizer",
        "the devices that have graphs, for the check under capturable=True",
    ),
    Private("_disable_dynamo", "torch", "torch.compiler.disable does the same and imports the whole compiler"),
    Private(
        "_foreach_norm",
        "torch",
        "the norms of many gradients in one launch, in float32; get_total_norm rounds those of bfloat16 to bfloat16",
    ),
    Private("_base", "torch:Tensor", "the vector of which a clock is an element, so that one addition counts all"),
    Private("_version", "torch:Tensor", "tells whether anybody has written an importance since its mask was looked up"),
    Private(
        "_post_accumulate_grad_hooks",
        "torch:Tensor",
        "tells whether an optimizer takes a gradient in backward(); hooks can be registered and not listed",
    ),
    Private("_pytree", "torch.utils", "splits a batch of any structure into examples, as torch.func does"),
    Private(
        "_fsdp_flattened",
        "instance",
        "FSDP1's mark of a slice of a parameter, which says nothing else of what it is a slice of",
    ),
)


def missing() -> list[str]:
    """Return the names that this torch has not, with what each was for; those of instances are not looked for."""
    found = []
    for private in PRIVATE:
        module, _, cls = private.where.partition(":")
        if module == "instance":
            continue
        owner = importlib.import_module(module)
        owner = getattr(owner, cls) if cls else owner
        there = hasattr(owner, private.name)
        if not there and not cls:
            try:
                importlib.import_module(f"{module}.{private.name}")
            except ImportError:
                pass
            else:
                there = True
        if not there:
            found.append(f"{private.where}.{private.name}: {private.reason}")
    return found
