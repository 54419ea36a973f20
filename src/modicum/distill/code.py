"""Code: probabilities as whole numbers of 8 or 16 bits.

A probability p is stored as c = round(C·√p) with C = 2^bits - 1, and read back as (c / C)². The step is then
in proportion to √p, so that small probabilities keep more of their value than with equal steps, and 0 and 1
are exact. With |√p - c/C| ≤ 1 / (2C) the error is at most √p / C + 1 / (4C²). The code is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modicum.errors import InputError

_DTYPES: dict[int, Any] = {8: np.uint8, 16: np.uint16}


@dataclass(frozen=True)
class ProbabilityCode:
    """Codes of so many bits.

    Raises:
        InputError: the bits are not 8 or 16.
    """

    bits: int = 16

    def __post_init__(self) -> None:
        if self.bits not in _DTYPES:
            raise InputError(f"a probability in {self.bits} bits is not known; give 8 or 16")

    @property
    def largest(self) -> int:
        """C, the code of probability 1."""
        return int(2**self.bits - 1)

    def encode(self, probabilities: NDArray[Any]) -> NDArray[Any]:
        """Probabilities, 0 to 1, of any shape -> their codes, uint8 or uint16."""
        roots = np.sqrt(np.clip(probabilities.astype(np.float64), 0.0, 1.0))
        codes: NDArray[Any] = np.rint(roots * self.largest).astype(_DTYPES[self.bits])
        return codes

    def decode(self, codes: NDArray[Any]) -> NDArray[np.float32]:
        """Codes -> probabilities, float32."""
        return np.square(codes.astype(np.float64) / self.largest).astype(np.float32)

    def error(self, probability: float) -> float:
        """A bound on the absolute error of a decoded probability, without float32's own rounding."""
        return float(probability**0.5 / self.largest + 1 / (4 * self.largest**2))
