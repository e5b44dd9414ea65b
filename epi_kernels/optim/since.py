"""What an optimizer that moves most entries has changed since a snapshot, for rolling updates of a server."""

from typing import Any

from epi_kernels.delta.entries import Delta
from epi_kernels.delta.since import Base, changes
from epi_kernels.engine.groups import name_of, params_of
from epi_kernels.engine.settings import Groups


class DeltaSince:
    """A mixin for a `FusedOptimizer` whose steps move any entry that is not held still."""

    _method: Any  # the optimizer's
    param_groups: list[dict[str, Any]]

    def delta_since(self, base: Base) -> Delta:
        """Return what training has changed since a snapshot, for `epi_kernels.delta`: the entries whose bits differ.

        Protected and frozen entries are not among them. One parameter after the other is compared; if parameters are
        sharded, every rank must call. For the next update take another snapshot, or apply the delta to this one.

        Args:
            base: {name: tensor}, such as ``{name: p.detach().clone() for name, p in model.named_parameters()}``, or a
                model, or the path of the checkpoint that a server has loaded.

        Raises:
            ValueError: the optimizer has no parameter names; or the base lacks a parameter of the optimizer, or has it
                in another shape, dtype or placement.
        """
        check_names(self.param_groups)
        self._method.catch_up(self)
        params = params_of(self.param_groups)
        return changes([(name_of(param, self.param_groups), param) for param in params], base)


def check_names(groups: Groups) -> None:
    """Check that all groups have parameter names, by which a delta stores entries.

    Raises:
        ValueError: one has none.
    """
    if not all("param_names" in group for group in groups):
        raise ValueError("a delta goes by names, and the optimizer has none; pass it model.named_parameters()")
