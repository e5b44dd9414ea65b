"""The settings of evolving isolation in a parameter group, and their checks."""

import math
from typing import Any

from epi_kernels.engine.checkpoint import LATEST
from epi_kernels.engine.settings import is_count, is_number

# The key under which a group keeps the number of steps that the optimizer has taken. Refreshes follow this clock, not
# state["step"]: parameters that no longer train, such as those of a finished task, must not stop the refreshes.
CLOCK = "isolation_clock"

# settings of the whole optimizer: equal in all groups, each of which has them so that a checkpoint saves them
SHARED = ("mask_interval", "layers", "normalize", "scope", "threshold", "importance")

# all settings, without the clock
SETTINGS = ("isolation_ratio", "importance_beta", *SHARED)

_CHOICES = {
    "normalize": ("layer", "none"),
    "scope": ("global", "layer"),
    "threshold": ("exact", "histogram"),
}


def check_settings(settings: dict[str, Any], importance_slot: str | None = None) -> None:
    """Check the settings of a group, which must have all of SETTINGS, and its clock if there is one.

    Args:
        settings: the settings of the group.
        importance_slot: the slot of the optimizer's rule that can serve as the importance; None: no slot can.

    Raises:
        ValueError: a setting is out of its range; the message names the setting and its value.
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
