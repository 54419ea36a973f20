"""Progress: what a long run tells of how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Told what is done, how many blocks are, and of how many."""
