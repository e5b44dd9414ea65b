"""Which release, if any, steps a parameter in backward() and frees its gradient."""

from typing import Any

from torch import Tensor


def releases_of(param: Tensor) -> list[Any]:
    """Return the releases that step a parameter in backward() and free its gradient: one, or none.

    See `epi_kernels.optim.release`, whose hooks have an attribute `release`.
    """
    hooks = (param._post_accumulate_grad_hooks or {}).values()
    return [hook.release for hook in hooks if hasattr(hook, "release")]
