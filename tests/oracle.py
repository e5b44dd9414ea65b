"""EPI, Algorithm 1, written a second time: numpy, float64, sorting. It shares no code with the package.

Written from the specification alone, the plainest way, so that it cannot share a mistake with the kernels.
"""

import math
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Tensor:
    """A parameter and its state."""

    theta: np.ndarray
    layer: str
    ratio: float
    m: np.ndarray = field(init=False)
    v: np.ndarray = field(init=False)
    importance: np.ndarray = field(init=False)
    mask: np.ndarray = field(init=False)
    steps: int = 0

    def __post_init__(self) -> None:
        self.theta = self.theta.astype(np.float64)
        self.m, self.v, self.importance = (np.zeros_like(self.theta) for _ in range(3))
        self.mask = np.zeros(self.theta.shape, bool)


@dataclass
class Oracle:
    """AdamW under evolving isolation, for {name: Tensor}."""

    tensors: dict[str, Tensor]
    lr: float
    beta: float
    interval: int | None
    normalize: str = "layer"
    scope: str = "global"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clock: int = 0

    def step(self, grads: dict[str, np.ndarray]) -> None:
        """Take one step with the gradients there are."""
        for name, grad in grads.items():
            tensor = self.tensors[name]
            square = grad.astype(np.float64) ** 2
            advanced = self.beta * tensor.importance + (1 - self.beta) * square
            tensor.importance = np.where(np.isfinite(square), advanced, tensor.importance)
            tensor.steps += 1
        self.clock += 1
        if self.interval and self.clock % self.interval == 0:
            self.refresh()
        for name, grad in grads.items():
            self._update(self.tensors[name], grad.astype(np.float64))

    def refresh(self) -> None:
        """Choose the protected entries by sorting."""
        scores = self._scores()
        budgets: dict[tuple[float, str], list[str]] = {}
        for name, tensor in self.tensors.items():
            if tensor.ratio:
                budgets.setdefault((tensor.ratio, tensor.layer if self.scope == "layer" else ""), []).append(name)
        for (ratio, _), names in budgets.items():
            everything = np.sort(np.concatenate([scores[name].ravel() for name in names]))[::-1]
            k = math.floor(ratio * everything.size + 1e-9)
            for name in names:
                if k == 0:
                    self.tensors[name].mask[...] = False
                else:
                    self.tensors[name].mask = (scores[name] >= everything[k - 1]) & (scores[name] > 0)

    def _scores(self) -> dict[str, np.ndarray]:
        scores = {}
        for name, tensor in self.tensors.items():
            if self.normalize == "none":
                scores[name] = tensor.importance
                continue
            layer = np.concatenate(
                [t.importance.ravel() for t in self.tensors.values() if t.layer == tensor.layer and t.ratio]
                or [np.zeros(0)]
            )
            low, high = (layer.min(), layer.max()) if layer.size else (0.0, 0.0)
            flat = high == low
            scores[name] = np.zeros_like(tensor.importance) if flat else (tensor.importance - low) / (high - low)
        return scores

    def _update(self, tensor: Tensor, grad: np.ndarray) -> None:
        beta1, beta2 = self.betas
        tensor.m = beta1 * tensor.m + (1 - beta1) * grad
        tensor.v = beta2 * tensor.v + (1 - beta2) * grad**2
        corrected_m = tensor.m / (1 - beta1**tensor.steps)
        corrected_v = tensor.v / (1 - beta2**tensor.steps)
        step = self.lr * (corrected_m / (np.sqrt(corrected_v) + self.eps) + self.weight_decay * tensor.theta)
        tensor.theta = np.where(tensor.mask, tensor.theta, tensor.theta - step)
