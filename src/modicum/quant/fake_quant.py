"""Fake quantisation: real numbers rounded to integers of a free range, with gradients.

q = clip(round(x / s), -Q, Q) and x ≈ q · s. Q is any integer from 1 to 32,767, not only 2^(b-1) - 1: 63, 31
and what range scaling gives are ordinary. Rounding is to the nearest even integer. Its gradient is taken as 1
inside the range and 0 outside (straight-through; Bengio et al. 2013, arXiv 1308.3432).

Ranges R = s · Q are found in one of four ways:

- max: the largest absolute value so far.
- ema: an exponential moving average of the largest absolute value of each batch (Jacob et al. 2018,
  arXiv 1712.05877, section 3.1; there of minimum and maximum).
- mse: the share of a batch's largest absolute value with the least squared error, from a grid; averaged as in
  ema (the averaging is ours).
- lsq: the step s is a parameter, trained with its gradient multiplied by 1 / sqrt(N · Q) (Esser et al. 2020,
  arXiv 1902.08153, sections 2.1 and 2.2). It starts at 2 · mean|x| / sqrt(Q) of the first batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from modicum.errors import InputError
from modicum.quant.convolution import computing_dtype
from modicum.quant.saturation import SaturationCounter

RangeMethod = Literal["max", "ema", "mse", "lsq"]
_STEPS = 64
"""Ranges that `mse` tries: 1/64, 2/64, … of the largest absolute value."""


@dataclass(frozen=True)
class FakeQuantSettings:
    """How numbers are quantised.

    Attributes:
        limit: Q, the largest integer.
        method: how the range is found.
        momentum: the weight of the latest batch in `ema` and `mse`; 1: only the latest counts.

    Raises:
        InputError: a number is out of range, or the method is not known.
    """

    limit: int = 127
    method: RangeMethod = "ema"
    momentum: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.limit, int) or not 1 <= self.limit <= 32_767:
            raise InputError(f"the limit is {self.limit}: give a whole number of 1 to 32,767 (127 for int8)")
        if self.method not in get_args(RangeMethod):
            raise InputError(
                f"the method is {self.method!r}: choose one of {', '.join(get_args(RangeMethod))}"
            )
        if not 0 < self.momentum <= 1:
            raise InputError(f"the momentum is {self.momentum}: give a number above 0 and at most 1")


class FakeQuant(nn.Module):
    """Rounds to integers in [-Q, Q] times a scale.

    Args:
        settings: Q and the method.
        shape: of the scale. It broadcasts to what is quantised: () is one scale for the tensor, [K, 1, 1]
            one for each output channel of weights [K, C, r], [n, 1, 1, 1] one for each of n Winograd taps.
        name: the layer, for errors.
    """

    step: Tensor
    counter: SaturationCounter

    def __init__(
        self, settings: FakeQuantSettings, shape: tuple[int, ...] = (), name: str = "a layer"
    ) -> None:
        super().__init__()
        self.settings, self.name = settings, name
        self.limit = settings.limit
        self.counter = SaturationCounter()
        self.is_counting = False
        # NaN until something was observed.
        step = torch.full(shape, math.nan)
        if settings.method == "lsq":
            self.step = nn.Parameter(step)
        else:
            self.register_buffer("step", step)

    @property
    def is_calibrated(self) -> bool:
        """Whether it has a range."""
        return not bool(self.step.detach().isnan().any())

    @property
    def scale(self) -> Tensor:
        """s, of the shape given; positive.

        Raises:
            InputError: nothing was observed.
        """
        if not self.is_calibrated:
            raise InputError(
                f"{self.name} has no range yet: run modicum.quant.calibrate(model, batches) before it is used"
            )
        return self.step.abs().clamp_min(torch.finfo(self.step.dtype).tiny)

    def set_limit(self, limit: int) -> None:
        """Use another Q with the same range R."""
        with torch.no_grad():
            self.step.mul_(self.limit / limit)
        self.limit = limit

    def observe(self, x: Tensor) -> None:
        """Take account of a batch in the range. A learned step only takes the first.

        Raises:
            InputError: a value is not a number, or infinite; the layer is named.
        """
        if not x.numel():
            return  # an empty batch says nothing of the range
        x = x.detach().to(self.step.dtype)
        if not bool(x.isfinite().all()):
            raise InputError(
                f"{self.name} was given values that are not finite numbers (inf or nan): look for the layer "
                "or the recording that makes the first of them"
            )
        method, momentum = self.settings.method, self.settings.momentum
        if method == "lsq":
            if not self.is_calibrated:
                self._set(2 * self._reduce(x.abs(), "mean") / math.sqrt(self.limit))
            return
        largest = self._reduce(x.abs(), "amax")
        if method == "mse":
            largest = self._least_error(x, largest)
        new = largest / self.limit
        if self.is_calibrated and method == "max":
            new = torch.maximum(new, self.step)
        elif self.is_calibrated:
            new = self.step + momentum * (new - self.step) if momentum < 1 else new
        self._set(new)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Whole numbers in [-Q, Q] and s; x ≈ the one times the other.

        Both are of x's dtype, or float32 where that is narrower: float16 does not hold small scales.

        Gradients pass straight through the rounding. Those of a learned step are multiplied by 1 / sqrt(N ·
        Q).
        """
        x = x.to(computing_dtype(x.dtype))
        scale = self.scale.to(x.dtype)
        if self.settings.method == "lsq":
            values_per_step = x.numel() / max(scale.numel(), 1)
            scale = scale_gradient(scale, 1 / math.sqrt(max(values_per_step, 1) * self.limit))
        scaled = x * scale.reciprocal()
        if self.is_counting:
            self.counter.add(scaled.detach().round().abs() > self.limit)
        return straight_round(scaled.clamp(-self.limit, self.limit)), scale

    def forward(self, x: Tensor) -> Tensor:
        """x rounded to a multiple of s, in its own dtype."""
        integers, scale = self.quantize(x)
        return (integers * scale).to(x.dtype)

    def get_extra_state(self) -> Tensor:
        """Q, for the state dict: the step is of this Q."""
        return torch.tensor(self.limit)

    def set_extra_state(self, state: Tensor) -> None:
        """Take Q from a state dict.

        Raises:
            InputError: it is out of range.
        """
        self.limit = FakeQuantSettings(int(state)).limit

    def extra_repr(self) -> str:
        """What print shows."""
        return f"limit={self.limit}, method={self.settings.method!r}, shape={tuple(self.step.shape)}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast it; the step stays float32 in a model of float16."""
        step = self.step.detach()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch gives it no types
        dtype = computing_dtype(self.step.dtype)
        if dtype != self.step.dtype:
            self.step.data = step.to(self.step.device, dtype)
        return self

    def _set(self, step: Tensor) -> None:
        with torch.no_grad():
            # A channel of zeros is quantised to zeros by any step.
            self.step.copy_(torch.where(step > 0, step, torch.ones_like(step)))

    def _reduce(self, x: Tensor, how: Literal["amax", "mean", "sum"]) -> Tensor:
        """Over all axes on which the scale does not vary."""
        shape = (1,) * (x.dim() - self.step.dim()) + tuple(self.step.shape)
        axes = [axis for axis, size in enumerate(shape) if size == 1]
        found: Tensor = getattr(x, how)(axes, keepdim=True) if axes else x
        return found.reshape(self.step.shape)

    def _least_error(self, x: Tensor, largest: Tensor) -> Tensor:
        """The range, among _STEPS shares of the largest value, with the least squared error."""
        best, least = largest, torch.full_like(largest, math.inf)
        for step in range(_STEPS, 0, -1):
            candidate = largest * (step / _STEPS)
            scale = torch.where(candidate > 0, candidate / self.limit, 1.0)
            rounded = (x / scale).round().clamp(-self.limit, self.limit) * scale
            error = self._reduce((rounded - x).square(), "sum")
            best = torch.where(error < least, candidate, best)
            least = torch.minimum(error, least)
        return best


def straight_round(x: Tensor) -> Tensor:
    """Round to the nearest even integer, with a gradient of 1."""
    return _StraightRound.apply(x)  # type: ignore[no-any-return, no-untyped-call]  # torch gives it no types


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself, bit for bit, with its gradient multiplied."""
    return _ScaleGradient.apply(x, factor)  # type: ignore[no-any-return, no-untyped-call]  # as above


class _StraightRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None
