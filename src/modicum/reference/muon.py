"""Muon: momentum whose update is made orthogonal, for the matrices of a network's layers.

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"
(https://kellerjordan.github.io/posts/muon/). torch.optim.Muon computes in bfloat16, which takes ten times as
long as float32 on a CPU without bfloat16 units; this one stays in the gradient's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from modicum.reference.crew import Crew

_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """The matrix near U Vᵀ of its singular value decomposition U S Vᵀ, by Newton–Schulz steps.

    Args:
        matrix: [rows, columns].
        steps: of the iteration; five bring all singular values to between about 0.7 and 1.2.

    Returns:
        [rows, columns], in the same dtype.
    """
    a, b, c = _QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal, scaled by sqrt(max(1, rows / columns)); weight decay apart.

    The members of a crew share the matrices out: each makes its own orthogonal, then all get all.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        crew: Crew | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._crew = crew or Crew()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            moved = [self._momentum(weight, group["momentum"]) for weight in weights]
            updates = [
                orthogonal(one) if i % self._crew.size == self._crew.rank else torch.zeros_like(one)
                for i, one in enumerate(moved)
            ]
            for weight, update in zip(weights, self._crew.sum(updates), strict=True):
                rows, columns = weight.shape
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)

    def _momentum(self, weight: Tensor, momentum: float) -> Tensor:
        """The gradient, drawn to the running mean that it has just entered (Nesterov)."""
        gradient = weight.grad
        assert gradient is not None
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum"], momentum)
