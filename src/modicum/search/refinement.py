"""Refinement: greedy search that also takes back what later additions have made superfluous."""

from __future__ import annotations

from modicum.search.greedy import check_limit
from modicum.search.problem import Progress, SearchResult, SubsetEvaluation, SubsetProblem, best_addition


def refined_search(
    problem: SubsetProblem, *, max_items: int | None = None, progress: Progress | None = None
) -> SearchResult:
    """As `greedy_search`, but after each addition earlier items are left out if nothing is lost by it.

    It ends, as each addition raises the value and no removal lowers it. The result is never below the best
    single item. Our reading of "greedy with refinement"; the paper's is not known to us.

    Args:
        problem: what is chosen from.
        max_items: of the set at any time; None for no limit.
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
        num_evaluations += len(chosen) - 1
        for superfluous in _superfluous(evaluation, chosen[:-1]):
            chosen.remove(superfluous)
            left.append(superfluous)
        left.sort()
        history.append((len(chosen), evaluation.value))
        tell("greedy search with refinement", len(chosen), limit)
    return SearchResult(tuple(sorted(chosen)), evaluation.value, num_evaluations, tuple(history))


def _superfluous(evaluation: SubsetEvaluation, items: list[int]) -> list[int]:
    """Remove items, the oldest first, without which the value is no lower; which were removed."""
    removed = []
    for item in items:
        before = evaluation.value
        evaluation.remove(item)
        if evaluation.value >= before:
            removed.append(item)
        else:
            evaluation.add(item)
    return removed
