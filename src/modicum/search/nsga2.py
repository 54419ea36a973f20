"""NSGA-II over networks: an evolution that seeks the Pareto set of several objectives.

Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II", IEEE Trans. Evol. Comput. 6(2),
2002: non-dominated sorting and crowding distance. Genes are the numbers of variants, which have no order: so
uniform crossover, and a mutation that draws another variant.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from modicum.errors import InputError
from modicum.search.pareto import Point, dominates, front
from modicum.search.space import Picks

Evaluate = Callable[[Picks], Point]


@dataclass(frozen=True)
class NSGA2Settings:
    """How long evolution goes on.

    Attributes:
        population: networks of a generation.
        evaluations: in all; a network is evaluated once.
        mutations: genes of a child that change, on average.
        seed: of what is drawn.

    Raises:
        InputError: a value is out of range.
    """

    population: int = 100
    evaluations: int = 2500
    mutations: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.population < 4 or self.evaluations < self.population or not self.mutations > 0:
            raise InputError(
                f"{self}: give a population of 4 or more, at least as many evaluations, and mutations above 0"
            )


def nsga2(
    usable: Sequence[Sequence[int]], evaluate: Evaluate, settings: NSGA2Settings | None = None
) -> dict[Picks, Point]:
    """The networks that none of those evaluated dominates.

    Args:
        usable: for each block the numbers of its variants.
        evaluate: gives a network's objectives, all to be made small.
        settings: how long.

    Returns:
        Objectives by network; two networks with the same objectives are both there.
    """
    settings = settings or NSGA2Settings()
    generator = random.Random(settings.seed)
    known: dict[Picks, Point] = {}
    most = min(settings.evaluations, math.prod(map(len, usable)))

    def meet(picks: Picks) -> bool:
        if picks in known or len(known) >= most:
            return False
        known[picks] = tuple(evaluate(picks))
        return True

    population: list[Picks] = []
    while len(population) < min(settings.population, most):
        picks = tuple(generator.choice(list(own)) for own in usable)
        if meet(picks):
            population.append(picks)
        elif math.prod(map(len, usable)) <= most:  # a small space: all of it
            break
    idle = 0
    while len(known) < most and population and idle < 100:
        ranks = _ranked([known[p] for p in population])
        children: list[Picks] = []
        for _ in range(4 * settings.population):
            first, second = (_winner(population, ranks, generator) for _ in range(2))
            child = _child(first, second, usable, settings.mutations, generator)
            if meet(child):
                children.append(child)
            if len(children) == settings.population:
                break
        idle = 0 if children else idle + 1
        population = _survivors(population + children, known, settings.population)
    picks_known = list(known)
    return {picks_known[i]: known[picks_known[i]] for i in front(list(known.values()))}


def _ranked(points: Sequence[Point]) -> list[tuple[int, float]]:
    """Of each point its front (0 is the best) and minus its crowding distance: the smaller, the better."""
    ranks: list[tuple[int, float]] = [(0, 0.0)] * len(points)
    for number, own in enumerate(sorted_fronts(points)):
        distances = crowding_distances([points[i] for i in own])
        for i, distance in zip(own, distances, strict=True):
            ranks[i] = (number, -distance)
    return ranks


def sorted_fronts(points: Sequence[Point]) -> list[list[int]]:
    """Numbers of the points by front: the first is dominated by none, the next by the first only, …"""
    below: list[list[int]] = [[] for _ in points]
    above = [0] * len(points)
    for i, a in enumerate(points):
        for j, b in enumerate(points):
            if dominates(a, b):
                below[i].append(j)
                above[j] += 1
    fronts, own = [], [i for i, count in enumerate(above) if count == 0]
    while own:
        fronts.append(own)
        following = []
        for i in own:
            for j in below[i]:
                above[j] -= 1
                if above[j] == 0:
                    following.append(j)
        own = sorted(following)
    return fronts


def crowding_distances(points: Sequence[Point]) -> list[float]:
    """For each point of a front the sum over objectives of its neighbours' distance, in ranges."""
    distances = [0.0] * len(points)
    for axis in range(len(points[0])):
        order = sorted(range(len(points)), key=lambda i: points[i][axis])
        span = points[order[-1]][axis] - points[order[0]][axis]
        distances[order[0]] = distances[order[-1]] = math.inf
        for place in range(1, len(order) - 1):
            if span > 0:
                gap = points[order[place + 1]][axis] - points[order[place - 1]][axis]
                distances[order[place]] += gap / span
    return distances


def _winner(population: list[Picks], ranks: list[tuple[int, float]], generator: random.Random) -> Picks:
    first, second = (generator.randrange(len(population)) for _ in range(2))
    return population[min(first, second, key=lambda i: ranks[i])]


def _child(
    first: Picks,
    second: Picks,
    usable: Sequence[Sequence[int]],
    mutations: float,
    generator: random.Random,
) -> Picks:
    genes = [generator.choice(pair) for pair in zip(first, second, strict=True)]
    for place, own in enumerate(usable):
        if generator.random() < mutations / len(usable):
            genes[place] = generator.choice(list(own))
    return tuple(genes)


def _survivors(candidates: list[Picks], known: dict[Picks, Point], count: int) -> list[Picks]:
    ranks = _ranked([known[p] for p in candidates])
    order = sorted(range(len(candidates)), key=lambda i: ranks[i])
    return [candidates[i] for i in order[:count]]
