"""Pattern: how many weights go and where they may go from: of each row, of each M inputs, or in blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modicum.errors import InputError


class Pattern:
    """What a mask must look like; a mask is True where a weight is kept."""

    sparsity: float
    """The share of weights that goes."""

    def check(self, rows: int, width: int, name: str) -> None:
        """Raise unless a layer of [rows, width] weights can have it.

        Raises:
            InputError: it does not divide the layer, or would remove all of it.
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
            raise InputError(f"sparsity is {s!r}: it must be above 0 and below 1, the share that is removed")

    def removed(self, width: int) -> int:
        """How many of a row go: 100 · 0.29 is 28.999… in floating point, and 29 are meant."""
        return int(width * self.sparsity + 1e-6)

    def check(self, rows: int, width: int, name: str) -> None:
        if self.removed(width) >= width:
            raise InputError(f"{name}: a sparsity of {self.sparsity} leaves nothing of {width} inputs")

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
            raise InputError(f"pattern {self.kept}:{self.of}: N:M keeps N of M, 0 < N < M")
        object.__setattr__(self, "sparsity", 1 - self.kept / self.of)  # frozen

    def check(self, rows: int, width: int, name: str) -> None:
        if width % self.of:
            raise InputError(
                f"{name}: pattern {self} does not divide its {width} inputs; leave the layer out"
            )

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
            raise InputError(f"blocks of {self.height}x{self.width}: both must be at least 1")

    def removed(self, width: int) -> int:
        """Blocks of a strip that go."""
        return int(width // self.width * self.sparsity + 1e-6)

    def check(self, rows: int, width: int, name: str) -> None:
        if rows % self.height or width % self.width:
            raise InputError(
                f"{name}: blocks of {self.height}x{self.width} do not divide its {rows}x{width} weights"
            )
        if self.removed(width) >= width // self.width:
            raise InputError(f"{name}: a sparsity of {self.sparsity} leaves no block")

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
    if match := re.fullmatch(r"(\d+):(\d+)", text.strip()):
        found = Groups(int(match[1]), int(match[2]))
        if sparsity is not None and abs(sparsity - found.sparsity) > 1e-9:
            raise InputError(
                f"pattern {text} removes {found.sparsity:.4g}, not {sparsity:.4g}: give one of them"
            )
        return found
    if match := re.fullmatch(r"(\d+)x(\d+)", text.strip()):
        if sparsity is None:
            raise InputError(f"blocks of {text} need a sparsity as well")
        return Blocks(int(match[1]), int(match[2]), sparsity)
    raise InputError(f'pattern {text!r} is not known: "2:4" keeps 2 of each 4, "16x4" are blocks')
