"""The settings of evolving isolation in a parameter group, and their checks."""

import math
from typing import Any

from epi_kernels.engine.checkpoint import LATEST
from epi_kernels.engine.settings import is_count, is_number

# Where a group keeps the number of steps that the optimizer has taken. Refreshes go by this clock and not by
# state["step"]: parameters that stand still, such as those of a finished task, must not stop the refreshes.
CLOCK = "isolation_clock"

# settings of the whole optimizer: they stand in every group, so that a checkpoint holds them, and are equal in all
SHARED = ("mask_interval", "layers", "normalize", "scope", "threshold", "importance")

# all settings, without the clock
SETTINGS = ("isolation_ratio", "importance_beta", *SHARED)

_CHOICES = {
    "normalize": ("layer", "none"),
    "scope": ("global", "layer"),
    "threshold": ("exact", "histogram"),
}


def check_settings(settings: dict[str, Any], importance_slot: str | None = None) -> None:
    """Check the settings of a group, all of which it must have; the clock it may have.

    Args:
        settings: of the group.
        importance_slot: of the optimizer's rule, which can serve as the importance; None: there is none.

    Raises:
        ValueError: naming the argument and its value.
    """
    ratio, beta, interval = settings["isolation_ratio"], settings["importance_beta"], settings["mask_interval"]
    if not (is_number(ratio) and 0.0 <= ratio < 1.0):
        raise ValueError(f"Invalid isolation_ratio: {ratio!r}; it is a share of the entries, 0 <= p < 1")
    if not (is_number(beta) and 0.0 <= beta < 1.0):
        raise ValueError(f"Invalid importance_beta: {beta!r}; 0 <= beta < 1")
    if interval is not None and not is_count(interval, 1, math.inf):
        raise ValueError(f"Invalid mask_interval: {interval!r}; steps >= 1, or None for refresh() alone")
    importances = ("ema",) if importance_slot is None else ("ema", importance_slot)
    for name, allowed in {**_CHOICES, "importance": importances}.items():
        if not isinstance(settings[name], str) or settings[name] not in allowed:
            raise ValueError(f"Invalid {name}: {settings[name]!r}; choose one of {allowed}")
    clock = settings.get(CLOCK, 0)
    if not is_count(clock, 0, LATEST):
        raise ValueError(f"Invalid {CLOCK}: {clock!r}; it is a number of steps, >= 0")
