"""Search: which of many things to choose, by an objective of the whole choice.

Two kinds. Subsets of items: greedy, greedy with refinement, cross-entropy method, all subsets. One option for
each block of a network, so that the whole fits a device or a memory: after DONNA (Moons et al. 2020, arXiv
2012.08859), of which we could read the abstract. What it leaves open is our reading, and each file says so;
import those from their modules (`modicum.search.milp` needs scipy).

The names below load when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modicum.lazy_names import lazy_names

if TYPE_CHECKING:
    from modicum.search.cross_entropy import CrossEntropySettings, cross_entropy_search
    from modicum.search.exhaustive import exhaustive_search
    from modicum.search.function_problem import FunctionProblem
    from modicum.search.greedy import greedy_search
    from modicum.search.problem import SearchResult, SubsetEvaluation, SubsetProblem, value_of
    from modicum.search.refinement import refined_search

_HOMES = {
    "problem": ("SubsetProblem", "SubsetEvaluation", "SearchResult", "value_of"),
    "function_problem": ("FunctionProblem",),
    "greedy": ("greedy_search",),
    "refinement": ("refined_search",),
    "cross_entropy": ("CrossEntropySettings", "cross_entropy_search"),
    "exhaustive": ("exhaustive_search",),
}

__all__ = [  # noqa: RUF022  # in the order of the reader's interest
    "SubsetProblem",
    "SubsetEvaluation",
    "SearchResult",
    "value_of",
    "FunctionProblem",
    "greedy_search",
    "refined_search",
    "CrossEntropySettings",
    "cross_entropy_search",
    "exhaustive_search",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, globals())
