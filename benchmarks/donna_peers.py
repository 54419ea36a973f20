"""What benchmarks/donna.py compares a search with: candidates that are each trained."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from modicum.search.space import Picks

POPULATION, TOURNAMENT = 10, 3


@dataclass(frozen=True)
class PeerSearch:
    """What was found.

    Attributes:
        picks: the best candidate's.
        candidates: how many were trained.
        spent: seconds.
    """

    picks: Picks
    candidates: int
    spent: float


def peer_search(
    method: str,
    sizes: Sequence[int],
    fits: Callable[[Picks], bool],
    tried: Callable[[int, Picks], tuple[float, float]],
    budget: float,
    seed: int,
) -> PeerSearch:
    """Random search, or regularised evolution (Real et al. 2018, arXiv 1802.01548: the oldest of a population
    dies, the best of a tournament is the parent, one block changes).

    Args:
        method: "random" or "evolution".
        sizes: variants of each block.
        fits: whether a network may be a candidate.
        tried: accuracy and seconds of a candidate, by its number and picks.
        budget: seconds after which no candidate is begun.
        seed: of all draws; they depend on nothing else but accuracies.
    """
    generator = random.Random(seed)
    known: list[tuple[Picks, float]] = []
    spent = 0.0

    def proposed() -> Picks:
        while True:
            if method == "random" or len(known) < POPULATION:
                picks = tuple(generator.randrange(size) for size in sizes)
            else:
                parent = max(generator.sample(known[-POPULATION:], TOURNAMENT), key=lambda one: one[1])[0]
                place = generator.randrange(len(parent))
                other = generator.randrange(sizes[place])
                picks = (*parent[:place], other, *parent[place + 1 :])
            if fits(picks) and picks not in {one[0] for one in known}:
                return picks

    while spent < budget:
        picks = proposed()
        score, seconds = tried(len(known), picks)
        known.append((picks, score))
        spent += seconds
    return PeerSearch(max(known, key=lambda one: one[1])[0], len(known), spent)
