"""Exhaustive: all subsets; the oracle for other searches on small problems."""

from __future__ import annotations

from modicum.errors import InputError
from modicum.search.problem import Progress, SearchResult, SubsetProblem, is_better

LIMIT = 20
"""Items at most: 2^20 sets."""

_TELL_EVERY = 4096


def exhaustive_search(problem: SubsetProblem, *, progress: Progress | None = None) -> SearchResult:
    """The best of all subsets; of equal ones that of the fewest items, then the first one met.

    The sets come in the order of a Gray code, each one item away from the last (Knuth, "The Art of Computer
    Programming", section 7.2.1.1).

    Raises:
        InputError: there are more than 20 items.
    """
    num_items = problem.num_items
    if num_items > LIMIT:
        raise InputError(
            f"there are {num_items} items, so 2^{num_items} subsets: give at most {LIMIT}, or search by "
            "cross_entropy_search"
        )
    tell = progress or (lambda *_: None)
    evaluation = problem.evaluation()
    present: set[int] = set()
    best, value = frozenset(present), evaluation.value
    history = [(0, value)]
    for step in range(1, 2**num_items):
        item = (step & -step).bit_length() - 1
        if item in present:
            present.remove(item)
            evaluation.remove(item)
        else:
            present.add(item)
            evaluation.add(item)
        if is_better(evaluation.value, len(present), value, len(best)):
            best, value = frozenset(present), evaluation.value
            history.append((len(best), value))
        if step % _TELL_EVERY == 0:
            tell("all subsets", step, 2**num_items)
    return SearchResult(tuple(sorted(best)), value, 2**num_items, tuple(history))
