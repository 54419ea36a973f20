"""Greedy: add the item that raises the value most, until none does."""

from __future__ import annotations

from modicum.errors import InputError
from modicum.search.problem import Progress, SearchResult, SubsetProblem, best_addition


def greedy_search(
    problem: SubsetProblem, *, max_items: int | None = None, progress: Progress | None = None
) -> SearchResult:
    """Start with the empty set and add the best item, as long as the value rises.

    At most num_items · (additions + 1) values are computed. Of items that raise the value alike the first one
    is taken. The result is never below the best single item.

    Args:
        problem: what is chosen from.
        max_items: of the set; None for no limit.
        progress: see `Progress`.

    Raises:
        InputError: max_items is below 0.
    """
    limit = check_limit(problem, max_items)
    tell = progress or (lambda *_: None)
    evaluation = problem.evaluation()
    chosen: list[int] = []
    left = list(range(problem.num_items))
    num_evaluations, history = 1, [(0, evaluation.value)]
    while left and len(chosen) < limit:
        item, value = best_addition(evaluation, left)
        num_evaluations += len(left)
        if not value > evaluation.value:
            break
        evaluation.add(item)
        chosen.append(item)
        left.remove(item)
        history.append((len(chosen), evaluation.value))
        tell("greedy search", len(chosen), limit)
    return SearchResult(tuple(sorted(chosen)), evaluation.value, num_evaluations, tuple(history))


def check_limit(problem: SubsetProblem, max_items: int | None) -> int:
    """The largest size of a set.

    Raises:
        InputError: max_items is below 0.
    """
    if max_items is not None and max_items < 0:
        raise InputError(f"max_items is {max_items}: give 0 or more, or None for no limit")
    return problem.num_items if max_items is None else min(max_items, problem.num_items)
