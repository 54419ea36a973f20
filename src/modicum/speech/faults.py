"""Faults: what is wrong with rows that are left out, for a warning, and with files that are not written."""

from __future__ import annotations

import errno
from collections.abc import Sequence

_NAMED = 5


def is_full(error: OSError) -> bool:
    """Whether a file could not be written for want of room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def listed(faults: Sequence[str]) -> str:
    """The first five, and how many more there are; "" for none."""
    named = "; ".join(faults[:_NAMED])
    if len(faults) > _NAMED:
        named += f"; and {len(faults) - _NAMED:,} more"
    return named
