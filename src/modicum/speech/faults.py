"""Faults: what is wrong with rows that are left out, for a warning."""

from __future__ import annotations

from collections.abc import Sequence

_NAMED = 5


def listed(faults: Sequence[str]) -> str:
    """The first five, and how many more there are; "" for none."""
    named = "; ".join(faults[:_NAMED])
    if len(faults) > _NAMED:
        named += f"; and {len(faults) - _NAMED:,} more"
    return named
