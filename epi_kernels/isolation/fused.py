"""What an optimizer with a fused step and evolving isolation offers beside the methods of `Isolating`: DeepSpeed."""

from typing import Any, cast

from epi_kernels.isolation.evolving import Evolving
from epi_kernels.isolation.isolating import Isolating


class FusedIsolating(Isolating):
    """A mixin for a `FusedOptimizer` whose method is `Evolving`."""

    _method: Any  # the optimizer's

    @property
    def _isolation(self) -> Evolving:
        return cast(Evolving, self._method)

    def bind_deepspeed(self, engine: Any) -> None:
        """Assign every segment of DeepSpeed's flat partitions to its layer, for ZeRO-1, 2 and 3.

        Call it after ``deepspeed.initialize(..., optimizer=optimizer)``, on every rank. From then on a refresh
        that is due happens at the start of the next step, once all groups have advanced their importance. Without this
        call each flat partition is one layer with a budget of its own, and a warning says so.

        Args:
            engine: the engine that deepspeed.initialize returned.

        Raises:
            TypeError: `engine` is not a DeepSpeed engine.
            ValueError: the engine steps another optimizer, or its segments do not lie in this optimizer's partitions.
        """
        self._isolation.bind_deepspeed(self, engine)  # type: ignore[arg-type]
