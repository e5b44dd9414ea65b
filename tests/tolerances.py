"""Every bound of the tests, with its reason, and the measure it is in."""

import torch
from torch import Tensor

# A float32 step against torch's fused version, in `step_ulps`, of parameters that the step moves by no more than their
# own size. v is added in another order there.
STEP_ULPS = 2

# The same against torch's loop and foreach versions, whose square root may be MKL's: an ulp off for 0.6% of the float32
# roots on an Intel Xeon and 20% on an AMD EPYC (see equations.square_root), which costs one more. Torch's own loop and
# fused versions are 3 apart there.
ROUGH_ROOT_ULPS = 3

# The same, any version, where the update exceeds the parameter: all of its roundings show. Torch's own loop and fused
# versions are 4 apart there.
LARGE_STEP_ULPS = 4

# A float32 step against the same in float64, relative to the largest update of the tensor: parameters of size 1 lose
# 6e-8 of themselves, and an update is 1% of them.
STEP_ERROR = 1e-5

# A float64 step against torch's, absolute, for parameters of size 1 and a learning rate of at most 0.1.
STEP_FLOAT64 = 1e-12

# A run of 12 steps in float32 against one in float64, absolute, for parameters of size 1 and lr 1e-2: 12 steps of
# 1e-2, each off by a few parts in 1e-7 of itself, and a rounding of 6e-8 of the parameter at each.
RUN_OF_12 = 2e-5

# A run of 8 steps in bfloat16 on one machine against the same on another, absolute, for parameters up to 4 and lr 1/64:
# two roundings of 1/64 at 4. In float32 it is RUN_OF_12.
RUN_OF_8_IN_BFLOAT16 = 1 / 32

# A score of PIECE against a loop over examples in float64, relative: gradients of float32, summed in float32.
SCORE_ERROR = 1e-4


def step_ulps(ours: Tensor, theirs: Tensor, before: Tensor) -> tuple[float, float]:
    """Return the largest difference of two float32 results of one step, in ulp of the largest number of the step.

    A step subtracts the update from the parameter; the unit is the spacing of float32 at the largest of |parameter|,
    |update| and |result|. The spacing at the result alone would not do: a parameter that the step carries close to zero
    has an ulp far below the rounding of both operands.

    Returns:
        The largest where the update is no larger than the parameter, and the largest elsewhere; 0 where there is none.
    """
    update = (theirs - before).abs()
    scale = torch.stack([before.abs(), update, theirs.abs()]).amax(0)
    ulp = torch.nextafter(scale, torch.full_like(scale, torch.inf)) - scale
    ulps = (ours.double() - theirs.double()).abs() / ulp.double()
    large = update > before.abs()
    return torch.where(large, 0.0, ulps).max().item(), torch.where(large, ulps, 0.0).max().item()
