"""Stereo: semi-global matching in integers, and a generator of hardware that gives the same numbers.

After "Fully Parallel Architecture for Semi-global Stereo Matching with Refined Rank Method" (arXiv
1905.03716), of which we could read the abstract: what it leaves open is our reading, and each file says so.
Names load when they are first used; matching needs the extra "stereo", hardware the extra "hdl".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modicum.lazy_names import lazy_names

if TYPE_CHECKING:
    from modicum.stereo.cost import COSTS, CostKind, CostSettings
    from modicum.stereo.evaluation import Errors, measure, visible
    from modicum.stereo.images import read_image
    from modicum.stereo.matcher import Disparity, StereoMatcher, match
    from modicum.stereo.settings import PathSettings, RefineSettings, StereoSettings
    from modicum.stereo.word_lengths import WordLengths

_HOMES = {
    "cost": ("COSTS", "CostKind", "CostSettings"),
    "evaluation": ("Errors", "measure", "visible"),
    "images": ("read_image",),
    "matcher": ("Disparity", "StereoMatcher", "match"),
    "settings": ("PathSettings", "RefineSettings", "StereoSettings"),
    "word_lengths": ("WordLengths",),
}

__all__ = [  # noqa: RUF022  # in the order of the reader's interest
    "match",
    "StereoMatcher",
    "StereoSettings",
    "CostSettings",
    "PathSettings",
    "RefineSettings",
    "COSTS",
    "CostKind",
    "Disparity",
    "WordLengths",
    "read_image",
    "measure",
    "visible",
    "Errors",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, globals())
