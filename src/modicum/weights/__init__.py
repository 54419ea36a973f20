"""Sparse weights without training: a language model's linear layers pruned to a budget.

`modicum.prune` prunes; `modicum.weights.save` writes what came out. It loads when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modicum.weights.checkpoint import save

__all__ = ["save"]


def __getattr__(name: str) -> Any:
    if name != "save":
        raise AttributeError(f"module 'modicum.weights' has no attribute {name!r}")
    from modicum.weights.checkpoint import save

    return save
