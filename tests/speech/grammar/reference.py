"""Plain references in float64 loops: CTC by the recursion and by all paths, edits, Viterbi."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np


def add(*logs: float) -> float:
    """log Σ e^x"""
    top = max(logs)
    return top if top == -math.inf else top + math.log(sum(math.exp(x - top) for x in logs))


def forward(log_probs: Sequence[Sequence[float]], labels: Sequence[int]) -> float:
    """Graves et al. 2006, equations 6 to 8, one state after another."""
    states = [0]
    for label in labels:
        states += [label, 0]
    alpha = [-math.inf] * len(states)
    alpha[0] = log_probs[0][0]
    if labels:
        alpha[1] = log_probs[0][labels[0]]
    for frame in log_probs[1:]:
        before = list(alpha)
        for s, state in enumerate(states):
            terms = [before[s]]
            if s >= 1:
                terms.append(before[s - 1])
            if s >= 2 and state != 0 and state != states[s - 2]:
                terms.append(before[s - 2])
            alpha[s] = add(*terms) + frame[state]
    return add(*alpha[-2:]) if labels else alpha[-1]


def all_paths(log_probs: Sequence[Sequence[float]], labels: Sequence[int]) -> float:
    """The definition: the sum over all paths that collapse to the labels."""
    total = []
    for path in product(range(len(log_probs[0])), repeat=len(log_probs)):
        collapsed = [c for t, c in enumerate(path) if c != 0 and (t == 0 or path[t - 1] != c)]
        if collapsed == list(labels):
            total.append(sum(frame[c] for frame, c in zip(log_probs, path, strict=True)))
    return add(*total) if total else -math.inf


def edits(said: Sequence[str], heard: Sequence[str]) -> int:
    """Least cost of edits by recursion over the definition; a space for a letter costs 2."""
    if not said or not heard:
        return len(said) + len(heard)
    one, other = said[-1], heard[-1]
    cost = 0 if one == other else 2 if " " in (one, other) else 1
    return min(edits(said[:-1], heard[:-1]) + cost, edits(said[:-1], heard) + 1, edits(said, heard[:-1]) + 1)


def best_path(
    scores: np.ndarray, states: Sequence[int], stay: Sequence[float], moves: dict[tuple[int, int], float]
) -> list[float]:
    """Viterbi over a graph, state by state: the best score of ending in each state at the last frame.

    moves: (from, to) -> log-probability; from -1 is the start.
    """
    now = [moves.get((-1, s), -math.inf) + float(scores[0][states[s]]) for s in range(len(states))]
    for frame in scores[1:]:
        before = now
        now = []
        for s in range(len(states)):
            best = before[s] + stay[s]
            for (start, end), move in moves.items():
                if end == s and start >= 0:
                    best = max(best, before[start] + move)
            now.append(best + float(frame[states[s]]))
    return now
