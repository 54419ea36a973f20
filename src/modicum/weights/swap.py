"""1-swap: a mask refined, row by row, by the swap of one kept and one removed weight that lowers the layer's
mean squared error most, until none does.

The idea of SparseSwaps (arXiv 2512.10922); the algebra is written out in docs/weights.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.errors import InputError
from modicum.weights.pattern import Blocks, Groups, Pattern
from modicum.weights.statistics import Statistics

SHORT = 32
_FRESH = 64
"""Swaps after which the gradient is made anew from the mask."""


@dataclass(frozen=True)
class Swap:
    """How to swap."""

    max_swaps: int | None = None
    """Of a row, or of a strip of blocks; None: as many as it has inputs."""
    tolerance: float = 1e-9
    """A swap must lower the error by this share of it."""
    shortlist: int = SHORT
    """A round looks at the pairs of so many weights that are cheap to remove and of as many that are good to
    have back, and at all pairs only where those hold no swap that helps: a row ends where none of all does.
    """
    work_bytes: int = 4 * 2**20
    """Of scratch at a time: little enough to stay in a processor's cache."""
    centred: bool = False
    """Whether the bias will make up for the expected error, so that the covariance stands for G."""

    def __post_init__(self) -> None:
        if self.max_swaps is not None and self.max_swaps < 0:
            raise InputError(f"swap: max_swaps is {self.max_swaps}; it must not be negative")
        if self.shortlist < 1:
            raise InputError(f"swap: shortlist is {self.shortlist}; it must be at least 1")


@dataclass
class Swapped:
    """What came out."""

    mask: Tensor
    swaps: int
    """Of all rows together."""
    capped: int
    """Rows that might have gone on."""


def refine(how: Swap, weight: Tensor, mask: Tensor, inputs: Statistics, pattern: Pattern) -> Swapped:
    """The refined mask [out, d], of the same pattern: with g = eG, e the removed weights, reviving w at p and
    removing x at u changes a row's error by

        -2w·g_p + w²·G_pp + 2x·g_u + x²·G_uu - 2wx·G_pu.
    """
    matrix = inputs.matrix.to(weight.device, torch.float64)
    if how.centred:
        mean = inputs.mean.to(weight.device)
        matrix = matrix - torch.outer(mean, mean)
    w = weight.double()
    if isinstance(pattern, Blocks):
        return _Blocks(how, w, mask, matrix, pattern).run()
    d = w.shape[1]
    each = d * pattern.of if isinstance(pattern, Groups) else min(d, how.shortlist) ** 2
    rows = max(1, how.work_bytes // (8 * each))
    parts = [
        _Rows(how, w[at : at + rows], mask[at : at + rows], matrix, pattern).run()
        for at in range(0, len(w), rows)
    ]
    return Swapped(
        torch.cat([part.mask for part in parts]), sum(p.swaps for p in parts), sum(p.capped for p in parts)
    )


class _Rows:
    """Some rows, in lock-step; those that are done leave."""

    def __init__(self, how: Swap, weight: Tensor, mask: Tensor, matrix: Tensor, pattern: Pattern) -> None:
        self.how, self.weight, self.matrix, self.pattern = how, weight, matrix, pattern
        self.mask = mask.clone()
        self.diagonal = matrix.diagonal()

    def run(self) -> Swapped:
        most = self.weight.shape[1] if self.how.max_swaps is None else self.how.max_swaps
        rows = torch.arange(len(self.weight), device=self.weight.device)
        total = 0
        error, gradient = self._anew(rows)
        for number in range(most):
            if len(rows) == 0:
                break
            if number and number % _FRESH == 0:
                error, gradient = self._anew(rows)
            change, p, u = self._best(rows, gradient, every=False)
            good = change < -self.how.tolerance * error
            if not bool(good.all()):
                # before a row leaves, its gradient is made anew, and all its pairs are looked at
                late = ~good
                error[late], gradient[late] = self._anew(rows[late])
                change[late], p[late], u[late] = self._best(rows[late], gradient[late], every=True)
                good = change < -self.how.tolerance * error
                rows, p, u, change, error = (x[good] for x in (rows, p, u, change, error))
                gradient = gradient[good]
            self.mask[rows, p], self.mask[rows, u] = True, False
            w, x = self.weight[rows, p, None], self.weight[rows, u, None]
            gradient += x * self.matrix[u] - w * self.matrix[p]
            error += change
            total += len(rows)
        return Swapped(self.mask, total, len(rows))

    def _anew(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The error [r] of some rows and their gradients [r, d]."""
        gone = torch.where(self.mask[rows], 0.0, self.weight[rows])
        gradient = gone @ self.matrix
        return (gone * gradient).sum(1).clamp_min(0), gradient

    def _best(self, rows: Tensor, gradient: Tensor, every: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The best swap of each row: by how much the error changes, what comes back, what goes; [r] each.

        every: of all pairs, or of the shortlist.
        """
        w, kept = self.weight[rows], self.mask[rows]
        back = torch.where(kept, math.inf, w.square() * self.diagonal - 2 * w * gradient)  # a_p
        gone = torch.where(kept, w.square() * self.diagonal + 2 * w * gradient, math.inf)  # b_u
        if isinstance(self.pattern, Groups):
            return self._in_groups(w, back, gone)
        # Where rows have unequally many, those with fewer are filled up by pairs that cost infinitely much.
        removed, there = (int(x.sum(1).max()) if len(x) else 0 for x in (~kept, kept))
        short = self.weight.shape[1] if every else self.how.shortlist
        p = back.topk(min(short, removed), largest=False, sorted=False).indices
        u = gone.topk(min(short, there), largest=False, sorted=False).indices
        size = max(1, self.how.work_bytes // (8 * len(w) * u.shape[1]))
        best, *rest = (self._pairs(w, back, gone, part, u) for part in torch.split(p, size, 1))
        for found in rest:
            better = found[0] < best[0]
            for mine, theirs in zip(best, found, strict=True):
                mine[better] = theirs[better]
        return best

    def _pairs(
        self, w: Tensor, back: Tensor, gone: Tensor, p: Tensor, u: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Among the columns p [r, P] and u [r, U]."""
        change = self.matrix.take((p * w.shape[1]).unsqueeze(2) + u.unsqueeze(1))
        change *= (-2 * w.gather(1, p)).unsqueeze(2)
        change *= w.gather(1, u).unsqueeze(1)
        change += back.gather(1, p).unsqueeze(2)
        change += gone.gather(1, u).unsqueeze(1)
        least, at = change.flatten(1).min(1)
        columns = u.shape[1]
        return (
            least,
            p.gather(1, (at // columns)[:, None])[:, 0],
            u.gather(1, (at % columns)[:, None])[:, 0],
        )

    def _in_groups(self, w: Tensor, back: Tensor, gone: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert isinstance(self.pattern, Groups)
        m, (r, d) = self.pattern.of, w.shape
        a, b, x = (t.view(r, d // m, m) for t in (back, gone, w))
        blocks = self.matrix.view(d // m, m, d // m, m)
        number = torch.arange(d // m, device=w.device)
        between = blocks[number, :, number]  # [d/M, M, M]
        change = a.unsqueeze(3) + b.unsqueeze(2) - 2 * x.unsqueeze(3) * x.unsqueeze(2) * between
        least, at = change.flatten(1).min(1)
        group, inside = at // (m * m), at % (m * m)
        return least, group * m + inside // m, group * m + inside % m


class _Blocks:
    """Strips of rows whose blocks go and come back as a whole."""

    def __init__(self, how: Swap, weight: Tensor, mask: Tensor, matrix: Tensor, pattern: Blocks) -> None:
        self.how, self.matrix, self.pattern = how, matrix, pattern
        self.weight, self.mask = weight, mask.clone()

    def run(self) -> Swapped:
        high, wide = self.pattern.height, self.pattern.width
        strips, count = self.weight.shape[0] // high, self.weight.shape[1] // wide
        most = count if self.how.max_swaps is None else self.how.max_swaps
        blocks = self.matrix.view(count, wide, count, wide)
        total = capped = 0
        for strip in range(strips):
            rows = slice(strip * high, (strip + 1) * high)
            w = self.weight[rows].view(high, count, wide)
            kept = self.mask[rows].view(high, count, wide)[0, :, 0].clone()
            swaps = 0
            for swaps in range(most + 1):
                gone = torch.where(kept[None, :, None], 0.0, w)
                gradient = torch.einsum("rpi,piqj->rqj", gone, blocks)
                error = float((gone * gradient).sum())
                own = torch.einsum("rpi,pij,rpj->p", w, blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1), w)
                slope = (w * gradient).sum((0, 2))
                cross = torch.einsum("rpi,piqj,rqj->pq", w, blocks, w)
                change = (own - 2 * slope)[:, None] + (own + 2 * slope)[None] - 2 * cross
                change[kept] = math.inf
                change[:, ~kept] = math.inf
                least, at = change.flatten().min(0)
                if not float(least) < -self.how.tolerance * max(error, 0):
                    break
                if swaps == most:
                    capped += 1
                    break
                kept[int(at) // count], kept[int(at) % count] = True, False
            total += swaps
            self.mask[rows] = kept.repeat_interleave(wide)[None].expand(high, -1)
        return Swapped(self.mask, total, capped)
