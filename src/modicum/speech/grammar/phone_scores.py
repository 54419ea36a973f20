"""Phone scores: Viterbi log-likelihoods of many phone sequences, and of any phones at all."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from modicum.speech.grammar.sphinx_definition import SphinxDefinition

_FILLER = math.log(0.005)
"""Of a silence or noise between words: pocketsphinx's silprob."""

_PHONE = math.log(0.1)
"""Of each further phone of free speech: pocketsphinx's kws_plp."""

_STAY = math.log(0.9)
"""Of a filler's single state."""

Words = Sequence[Sequence[str]]
"""Phones of each word."""


def phone_scores(
    scores: np.ndarray, definition: SphinxDefinition, expressions: Sequence[Words]
) -> np.ndarray:
    """The likelihood of the best path through each expression: log-scores [expressions] float32.

    An expression is a chain of its phones' states. Before it, after it and between words there may be a
    filler: one state, as likely as the most likely state of all filler phones. Computed together, padded to
    the longest.

    Args:
        scores: [frames, senones] log-likelihoods.
        definition: the models of phones.
        expressions: words of phones; none is empty.

    Returns:
        -inf where the frames are too few.
    """
    if not expressions:
        return np.zeros(0, dtype=np.float32)
    num_senones = scores.shape[1]
    filler_states = definition.states[list(definition.fillers)].ravel()
    wide = np.concatenate([scores, scores[:, filler_states].max(1, keepdims=True)], 1).astype(np.float32)
    chains = [_chain(definition, words, num_senones) for words in expressions]
    width = max(len(states) for states, _, _ in chains)
    states = np.full((len(chains), width), num_senones, dtype=np.int64)
    stay = np.zeros((len(chains), width), dtype=np.float32)
    # Into a state from the one before, and from the one before that past a filler.
    enter = np.full((len(chains), width), -np.inf, dtype=np.float32)
    skip = np.full((len(chains), width), -np.inf, dtype=np.float32)
    sizes = np.zeros(len(chains), dtype=np.int64)
    leave = np.zeros(len(chains), dtype=np.float32)
    for row, (chain, own_stay, go) in enumerate(chains):
        size = len(chain)
        sizes[row], leave[row] = size, go[-2]
        states[row, :size], stay[row, :size] = chain, own_stay
        is_filler = np.array(chain) == num_senones
        enter[row, 1:size] = go[:-1]
        enter[row, :size][is_filler] += _FILLER
        after = np.flatnonzero(is_filler[1:-1]) + 2
        skip[row, after] = go[after - 2]
    alpha = np.full((len(chains), width + 2), -np.inf, dtype=np.float32)
    first = wide[0][states]
    alpha[:, 2] = first[:, 0] + _FILLER
    alpha[:, 3] = first[:, 1]
    for frame in wide[1:]:
        best = np.maximum(alpha[:, 2:] + stay, alpha[:, 1:-1] + enter)
        np.maximum(best, alpha[:, :-2] + skip, out=best)
        alpha[:, 2:] = best + frame[states]
    rows = np.arange(len(chains))
    # The last state is a filler, the one before that of the last phone.
    found: np.ndarray = np.maximum(alpha[rows, 1 + sizes], alpha[rows, sizes] + leave)
    return found


def free_score(scores: np.ndarray, definition: SphinxDefinition) -> float:
    """The likelihood of the best path through a loop of all phones without context, fillers among them."""
    states = definition.states[: len(definition.phones)]
    transitions = definition.transitions[definition.matrix[: len(definition.phones)]]
    stay = np.stack([transitions[:, at, at] for at in range(3)], 1)
    go = np.stack([transitions[:, at, at + 1] for at in range(3)], 1)
    alpha = np.full(states.shape, -np.inf)
    alpha[:, 0] = scores[0][states[:, 0]]
    for frame in scores[1:]:
        before = alpha + go
        entered = np.concatenate(
            [np.full((len(states), 1), before[:, 2].max() + _PHONE), before[:, :2]], axis=1
        )
        alpha = np.maximum(alpha + stay, entered) + frame[states]
    return float((alpha[:, 2] + go[:, 2]).max())


def _chain(
    definition: SphinxDefinition, words: Words, filler: int
) -> tuple[list[int], list[float], np.ndarray]:
    """States, and log-probabilities of staying in each and of leaving it for the next."""
    models = iter(definition.models(words))
    states: list[int] = [filler]
    stay: list[float] = [_STAY]
    go: list[float] = [math.log1p(-math.exp(_STAY))]
    for word in words:
        for _ in word:
            model = next(models)
            transitions = definition.transitions[definition.matrix[model]]
            states += [int(state) for state in definition.states[model]]
            stay += [float(transitions[at, at]) for at in range(3)]
            go += [float(transitions[at, at + 1]) for at in range(3)]
        states.append(filler)
        stay.append(_STAY)
        go.append(math.log1p(-math.exp(_STAY)))
    return states, stay, np.array(go)
