"""Every bound of the tests, with its reason, and the measure it is in."""

import torch
from torch import Tensor

# A float32 step against torch's, in `step_ulps`. Everything rounds as in torch's loop and foreach versions, except for
# their square root, which may be MKL's and then is an ulp off (see equations.square_root): an ulp of a number close to
# a power of two is two of the quotient, and the rounding of the difference adds one. Torch's fused version rounds v in
# another order, and is up to 4 away from torch's own loop where the update exceeds the parameter: against it the bound
# is the larger of this one and the distance of torch's loop.
STEP_ULPS = 3

# A float64 step against torch's, absolute, for parameters of size 1 and a learning rate of at most 0.1.
STEP_FLOAT64 = 1e-12

# A run of 12 steps in float32 against one in float64, absolute, for parameters of size 1 and lr 1e-2: 12 steps of
# 1e-2, each off by a few parts in 1e-7 of itself, and a rounding of 6e-8 of the parameter at each.
RUN_OF_12 = 2e-5


def step_ulps(ours: Tensor, theirs: Tensor, before: Tensor) -> float:
    """Return the largest difference of two float32 results of one step, in ulp of the largest number of the step.

    A step subtracts the update from the parameter; the unit is the spacing of float32 at the largest of |parameter|,
    |update| and |result|. The spacing at the result alone would not do: a parameter that the step carries close to zero
    has an ulp far below the rounding of both operands.
    """
    scale = torch.stack([before.abs(), (theirs - before).abs(), theirs.abs()]).amax(0)
    ulp = torch.nextafter(scale, torch.full_like(scale, torch.inf)) - scale
    return ((ours.double() - theirs.double()).abs() / ulp.double()).max().item()
