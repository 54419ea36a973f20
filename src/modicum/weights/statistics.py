"""Statistics: what the inputs of a linear layer are like, gathered once for all scores and refiners."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from modicum.errors import InputError

WIDE = 4096
"""Up to so many inputs the Gram matrix is kept in float64 (8·d² bytes), above it in float32."""


@dataclass
class Statistics:
    """Of `width` inputs over all tokens seen: their number, mean, variance, and Gram matrix if asked for.

    Parts merge by Chan's rule in float64 (Chan, Golub, LeVeque 1983), never by E[x²] - E[x]², which cancels
    where means are large.

    Args:
        width: d, inputs of the layer.
        gram: whether to keep G, d × d.
        name: of the layer, for errors.
    """

    width: int
    gram: bool = False
    name: str = "a layer"
    tokens: int = 0
    mean: Tensor = field(init=False)
    """[d] float64"""
    _squares: Tensor = field(init=False)  # [d] float64: sum of squared distances from the mean
    _within: Tensor = field(init=False)  # [d] float64: the same, from the mean of each token's own sequence
    _products: Tensor | None = field(init=False)  # [d, d]: AᵀA

    def __post_init__(self) -> None:
        self.mean, self._squares, self._within = torch.zeros(3, self.width, dtype=torch.float64)
        dtype = torch.float64 if self.width <= WIDE else torch.float32
        self._products = torch.zeros(self.width, self.width, dtype=dtype) if self.gram else None

    @property
    def nbytes(self) -> int:
        there = (self.mean, self._squares, self._within, self._products)
        return sum(x.nbytes for x in there if x is not None)

    def add(self, inputs: Tensor) -> None:
        """Take in the tokens of one sequence (pads left out): inputs [n, d].

        Raises:
            InputError: an input is not finite, or there are not `width` of them.
        """
        if inputs.dim() != 2 or inputs.shape[1] != self.width:
            raise InputError(f"{self.name}: inputs are {tuple(inputs.shape)}, they must be [n, {self.width}]")
        number = len(inputs)
        if number == 0:
            return
        wide = inputs.to("cpu", torch.float64)
        mean = wide.mean(0)
        if not bool(mean.isfinite().all()):
            raise InputError(
                f"{self.name}: its inputs are not finite: load the model in a dtype with more range, "
                "dtype='bfloat16' or 'float32', or check that its weights are whole"
            )
        squares = (wide - mean).square().sum(0)
        self._merge(number, mean, squares, squares)
        if self._products is not None:
            single = inputs.float()
            self._products += (single.T @ single).to("cpu", self._products.dtype)

    def merge(self, other: Statistics) -> None:
        """Take in what another has seen of the same layer."""
        self._merge(other.tokens, other.mean, other._squares, other._within)
        if self._products is not None:
            if other._products is None:
                raise InputError(f"{self.name}: merged with statistics that have no Gram matrix")
            self._products += other._products

    def _merge(self, number: int, mean: Tensor, squares: Tensor, within: Tensor) -> None:
        if number == 0:
            return
        total = self.tokens + number
        apart = mean - self.mean
        self._squares += squares + apart.square() * (self.tokens * number / total)
        self._within += within
        self.mean = self.mean + apart * (number / total)
        self.tokens = total

    @property
    def variance(self) -> Tensor:
        """[d] v_j, over all tokens."""
        return self._squares / max(1, self.tokens)

    @property
    def variance_within(self) -> Tensor:
        """[d]: over the tokens of each sequence by itself, as DSnoT's released code has it; never larger."""
        return self._within / max(1, self.tokens)

    @property
    def power(self) -> Tensor:
        """[d] G_jj, the mean square of each input; √ of it is Wanda's norm, but for a constant factor."""
        return self.variance + self.mean.square()

    @property
    def matrix(self) -> Tensor:
        """[d, d] G = AᵀA / n, exactly symmetric.

        The parts are products in fp32, whose two triangles may be rounded differently; a Cholesky factor
        would read only one of them, other solvers both.

        Raises:
            InputError: it was not gathered.
        """
        if self._products is None:
            raise InputError(f"{self.name}: the Gram matrix was not gathered")
        both = self._products + self._products.mT
        return both.div_(2 * max(1, self.tokens))

    def damped(self, damping: float = 0.01) -> Tensor:
        """[d, d] H = G + damping · mean(diag G) · I."""
        found = self.matrix.clone()
        diagonal = found.diagonal()
        diagonal += damping * diagonal.mean()
        return found
