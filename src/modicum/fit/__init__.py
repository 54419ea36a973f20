"""Fit: what a language model's weights and cache give up so that both fit one memory.

After DONNA (arXiv 2012.08859) and Puzzle (arXiv 2411.19146); docs/fit.md says what is ours. Needs scipy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modicum.lazy_names import lazy_names

if TYPE_CHECKING:
    from modicum.fit.entry import fit
    from modicum.fit.fit_report import FitReport
    from modicum.fit.settings import FitSettings, Target

_HOMES = {"entry": ("fit",), "fit_report": ("FitReport",), "settings": ("FitSettings", "Target")}

__all__ = ["FitReport", "FitSettings", "Target", "fit"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, globals())
