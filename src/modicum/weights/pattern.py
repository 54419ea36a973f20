"""Pattern: how many weights go and where they may go from: of each row, of each M inputs, or in blocks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from modicum.errors import InputError

Shapes = Mapping[str, tuple[int, int]]
"""[out, d] of each weight, by its name."""


class Pattern:
    """What a mask must look like; a mask is True where a weight is kept."""

    sparsity: float
    """The share of weights that goes."""

    def check(self, shapes: Shapes) -> None:
        """Raise unless all of these weights can have it.

        Raises:
            InputError: it does not divide one of them, or would remove all of it. The message names settings
                that all of them can have.
        """

    def select(self, score: Tensor) -> Tensor:
        """[out, d] bool: the highest scores; among equals the higher column is kept."""
        raise NotImplementedError

    def follows(self, mask: Tensor) -> bool:
        """Whether a mask is of this pattern exactly."""
        raise NotImplementedError


@dataclass(frozen=True)
class Rows(Pattern):
    """⌊d·sparsity⌋ weights of every row go."""

    sparsity: float

    def __post_init__(self) -> None:
        s = self.sparsity
        if isinstance(s, bool) or not isinstance(s, int | float) or not 0 < s < 1:
            raise InputError(
                f"sparsity is {s!r}: it must be above 0 and below 1, the share that is removed, such as "
                f"sparsity=0.6 for 60 %"
            )

    def removed(self, width: int) -> int:
        """How many of a row go: 100 · 0.29 is 28.999… in floating point, and 29 are meant."""
        return int(width * self.sparsity + 1e-6)

    def check(self, shapes: Shapes) -> None:
        for name, shape in shapes.items():
            if self.removed(self._choices(shape)) >= self._choices(shape):
                raise InputError(
                    f"{name}: a sparsity of {self.sparsity} leaves none of {self._choices(shape)} weights: "
                    f"give at most sparsity={_below(self._choices(shape)):.9g}"
                )
        most = max(map(self._choices, shapes.values()))
        if not self.removed(most):
            raise InputError(
                f"a sparsity of {self.sparsity} removes none of {most} weights, and no layer has more to "
                f"choose from: give at least sparsity={_least(most):.9g}"
            )

    def _choices(self, shape: tuple[int, int]) -> int:
        """Weights among which some are chosen: those of a row."""
        return shape[1]

    def select(self, score: Tensor) -> Tensor:
        order = score.argsort(dim=1, stable=True)[:, : self.removed(score.shape[1])]
        return torch.ones_like(score, dtype=torch.bool).scatter_(1, order, False)

    def follows(self, mask: Tensor) -> bool:
        return bool(((~mask).sum(1) == self.removed(mask.shape[1])).all())

    def __str__(self) -> str:
        return f"{self.sparsity:.4g}"


@dataclass(frozen=True)
class Whole(Rows):
    """⌊rows·d·sparsity⌋ weights of a layer go, by one threshold: rows lose unequally, as in some tools."""

    def select(self, score: Tensor) -> Tensor:
        order = score.flatten().argsort(stable=True)[: self.removed(score.numel())]
        flat = torch.ones(score.numel(), dtype=torch.bool, device=score.device)
        return flat.index_fill_(0, order, False).view(score.shape)

    def _choices(self, shape: tuple[int, int]) -> int:
        return shape[0] * shape[1]

    def follows(self, mask: Tensor) -> bool:
        return int((~mask).sum()) == self.removed(mask.numel())

    def __str__(self) -> str:
        return f"{self.sparsity:.4g} of the layer"


@dataclass(frozen=True)
class Groups(Pattern):
    """N of each M consecutive inputs are kept ("2:4")."""

    kept: int
    of: int
    sparsity: float = field(init=False)

    def __post_init__(self) -> None:
        if not 0 < self.kept < self.of:
            raise InputError(
                f"pattern {self.kept}:{self.of} keeps {self.kept} of each {self.of} inputs, and N:M needs "
                '0 < N < M: such as pattern="2:4"'
            )
        object.__setattr__(self, "sparsity", 1 - self.kept / self.of)  # frozen

    def check(self, shapes: Shapes) -> None:
        for name, (_, width) in shapes.items():
            if width % self.of:
                raise InputError(
                    f"{name}: pattern {self} needs a number of inputs that {self.of} divides, not {width}: "
                    f"give {self._advice([width for _, width in shapes.values()])}"
                )

    def _advice(self, widths: list[int]) -> str:
        """Settings near to this one that layers with so many inputs can have."""
        common, share = math.gcd(*widths), max(self.sparsity, _least(max(widths)))
        advice = f"sparsity={share:.9g} without a pattern"
        if common > 1:
            size = _divisor(common, self.of, 2)
            kept = min(size - 1, max(1, round(size * self.kept / self.of)))
            advice = f'pattern="{kept}:{size}", as all layers\' inputs are multiples of {common}, or {advice}'
        return advice

    def select(self, score: Tensor) -> Tensor:
        grouped = score.view(score.shape[0], -1, self.of)
        order = grouped.argsort(dim=2, stable=True)[:, :, : self.of - self.kept]
        return torch.ones_like(grouped, dtype=torch.bool).scatter_(2, order, False).view(score.shape)

    def follows(self, mask: Tensor) -> bool:
        return bool((mask.view(len(mask), -1, self.of).sum(2) == self.kept).all())

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"


@dataclass(frozen=True)
class Blocks(Pattern):
    """Blocks of `height` rows × `width` inputs go as a whole; as many from each strip of rows."""

    height: int
    width: int
    sparsity: float

    def __post_init__(self) -> None:
        Rows(self.sparsity)
        if self.height < 1 or self.width < 1:
            raise InputError(
                f"blocks of {self.height}x{self.width}: rows and inputs must be at least 1, such as "
                f'pattern="{max(1, self.height)}x{max(1, self.width)}"'
            )

    def removed(self, width: int) -> int:
        """Blocks of a strip that go."""
        return int(width // self.width * self.sparsity + 1e-6)

    def check(self, shapes: Shapes) -> None:
        for name, (rows, width) in shapes.items():
            if rows % self.height or width % self.width:
                raise InputError(
                    f"{name}: blocks of {self.height}x{self.width} do not divide its {rows}x{width} weights: "
                    f"give {self._advice(shapes)}, which divides those of all layers"
                )
            blocks = width // self.width
            if self.removed(width) >= blocks:
                raise InputError(
                    f"{name}: a sparsity of {self.sparsity} leaves none of the {blocks} blocks of "
                    f"{self.height} rows: give at most sparsity={_below(blocks):.9g}"
                )
        if not any(self.removed(width) for _, width in shapes.values()):
            raise InputError(
                f"a sparsity of {self.sparsity} removes no block of {self.height}x{self.width}, as no layer "
                f"has enough of them beside each other: give {self._advice(shapes)}"
            )

    def _advice(self, shapes: Shapes) -> str:
        """Blocks near to these that all of the weights can have, and of which some go."""
        height = _divisor(math.gcd(*(rows for rows, _ in shapes.values())), self.height)
        inputs = [width for _, width in shapes.values()]
        common, most = math.gcd(*inputs), max(inputs)
        divisors = [d for d in range(1, common + 1) if common % d == 0]
        widths = [d for d in divisors if replace(self, width=d).removed(most)]
        if not widths:
            return f'pattern="{height}x1" with sparsity={_least(most):.9g}'
        return f'pattern="{height}x{min(widths, key=lambda d: abs(math.log(d / self.width)))}"'

    def sums(self, score: Tensor) -> Tensor:
        """[strips, blocks]: the sum of each block's scores."""
        rows, width = score.shape
        return score.view(rows // self.height, self.height, width // self.width, self.width).sum((1, 3))

    def spread(self, blocks: Tensor) -> Tensor:
        """Each block's value on all its weights."""
        return blocks.repeat_interleave(self.height, 0).repeat_interleave(self.width, 1)

    def select(self, score: Tensor) -> Tensor:
        sums = self.sums(score)
        order = sums.argsort(dim=1, stable=True)[:, : self.removed(score.shape[1])]
        return self.spread(torch.ones_like(sums, dtype=torch.bool).scatter_(1, order, False))

    def follows(self, mask: Tensor) -> bool:
        full = self.sums(mask.float())
        size = self.height * self.width
        whole = bool(((full == 0) | (full == size)).all())
        return whole and bool(((full == 0).sum(1) == self.removed(mask.shape[1])).all())

    def __str__(self) -> str:
        return f"{self.height}x{self.width} at {self.sparsity:.4g}"


def parse_pattern(text: str, sparsity: float | None) -> Pattern:
    """ "2:4" keeps 2 of 4; "16x4" are blocks, which need a sparsity.

    Raises:
        InputError: it is neither.
    """
    if sparsity is not None:
        Rows(sparsity)  # what it says of a sparsity out of range comes first
    if match := re.fullmatch(r"(\d+):(\d+)", text.strip()):
        found = Groups(int(match[1]), int(match[2]))
        if sparsity is not None and abs(sparsity - found.sparsity) > 1e-3:  # 0.6667 is meant by 1:3
            raise InputError(
                f'pattern {text} removes {found.sparsity:.4g}, not {sparsity:.4g}: give pattern="{found}" '
                "alone, "
                f"or sparsity={sparsity:.4g} alone"
            )
        return found
    if match := re.fullmatch(r"(\d+)x(\d+)", text.strip()):
        if sparsity is None:
            raise InputError(
                f"blocks of {text.strip()} need a sparsity as well, the share that is removed, such as "
                "sparsity=0.5"
            )
        return Blocks(int(match[1]), int(match[2]), sparsity)
    raise InputError(
        f'pattern {text!r} is not known: pattern="2:4" keeps 2 of each 4 inputs, pattern="16x4" with '
        "sparsity=0.5 removes half of the blocks of 16 rows and 4 inputs"
    )


def _divisor(number: int, near: int, least: int = 1) -> int:
    """The divisor of a number, at least `least`, that is nearest to another by ratio."""
    divisors = [d for d in range(least, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / near)))


def _below(number: int) -> float:
    """A sparsity that leaves one of so many."""
    return 1 - 0.5 / number


def _least(number: int) -> float:
    """A sparsity that removes one of so many."""
    return min(1.5 / number, 0.75)
