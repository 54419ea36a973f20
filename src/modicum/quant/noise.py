"""Signal-to-quantisation-noise ratio."""

from __future__ import annotations

import math

from torch import Tensor


def sqnr(found: Tensor, exact: Tensor) -> float:
    """10 · log10(‖exact‖² / ‖found − exact‖²), in dB; infinite where they are equal. Computed in float64."""
    found, exact = found.detach().double(), exact.detach().double()
    signal, error = exact.square().sum(), (found - exact).square().sum()
    if not float(error):
        return math.inf
    return 10 * math.log10(float(signal) / float(error)) if float(signal) else -math.inf
