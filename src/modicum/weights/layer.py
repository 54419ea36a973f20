"""Layer: what was done to one weight."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Layer:
    """What was done to one weight."""

    name: str
    block: int
    rows: int
    width: int
    kept: int
    sparsity: float
    tokens: int
    error_before: float | None
    """Share of the layer's mean squared output that is lost, by the mask as it was chosen."""
    error_refined: float | None
    error_after: float | None
    """After refinement and update."""
    changed: int
    """Weights that refinement brought back."""
    capped: int
    """Rows at which it might have gone on."""
    seconds: float
