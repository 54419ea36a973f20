"""Search: which of many items to choose, by an objective of the whole choice.

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
