"""Phone scores: Viterbi log-likelihoods of many phone sequences, and of any phones at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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

_FILLER_STATE = -1
"""Its likelihood stands behind those of all senones."""


@dataclass(frozen=True)
class PhoneChains:
    """Expressions as chains of states, padded to the longest. Made once for many recordings.

    An expression is a chain of its phones' states. Before it, after it and between words there may be a
    filler: one state, as likely as the most likely state of all filler phones.

    Attributes:
        fillers: senones of all filler phones.
        states: [expressions, width] int64, senones; -1 for a filler.
        stay: [expressions, width] float32, log-probability of staying in a state.
        enter: [expressions, width] float32, of coming from the state before.
        skip: [expressions, width] float32, of coming from the one before that, past a filler.
        sizes: [expressions] int64, states of each.
        leave: [expressions] float32, of leaving the last phone's last state.
    """

    fillers: np.ndarray
    states: np.ndarray
    stay: np.ndarray
    enter: np.ndarray
    skip: np.ndarray
    sizes: np.ndarray
    leave: np.ndarray

    @classmethod
    def of(cls, definition: SphinxDefinition, expressions: Sequence[Words]) -> PhoneChains:
        """Of expressions, words of phones; none is empty."""
        chains = [_chain(definition, words) for words in expressions]
        width = max((len(states) for states, _, _ in chains), default=0)
        states = np.full((len(chains), width), _FILLER_STATE, dtype=np.int64)
        stay = np.zeros((len(chains), width), dtype=np.float32)
        enter = np.full((len(chains), width), -np.inf, dtype=np.float32)
        skip = np.full((len(chains), width), -np.inf, dtype=np.float32)
        sizes = np.zeros(len(chains), dtype=np.int64)
        leave = np.zeros(len(chains), dtype=np.float32)
        for row, (chain, own_stay, go) in enumerate(chains):
            size = len(chain)
            sizes[row], leave[row] = size, go[-2]
            states[row, :size], stay[row, :size] = chain, own_stay
            is_filler = np.array(chain) == _FILLER_STATE
            enter[row, 1:size] = go[:-1]
            enter[row, :size][is_filler] += _FILLER
            after = np.flatnonzero(is_filler[1:-1]) + 2
            skip[row, after] = go[after - 2]
        fillers = definition.states[list(definition.fillers)].ravel()
        return cls(fillers, states, stay, enter, skip, sizes, leave)

    def scores(self, scores: np.ndarray) -> np.ndarray:
        """The likelihood of the best path through each expression: log-scores [expressions] float32.

        Args:
            scores: [frames, senones] log-likelihoods.

        Returns:
            -inf where the frames are too few.
        """
        if not len(self.states):
            return np.zeros(0, dtype=np.float32)
        wide = np.concatenate([scores, scores[:, self.fillers].max(1, keepdims=True)], 1).astype(np.float32)
        alpha = np.full((len(self.states), self.states.shape[1] + 2), -np.inf, dtype=np.float32)
        first = wide[0][self.states]
        alpha[:, 2] = first[:, 0] + _FILLER
        alpha[:, 3] = first[:, 1]
        for frame in wide[1:]:
            best = np.maximum(alpha[:, 2:] + self.stay, alpha[:, 1:-1] + self.enter)
            np.maximum(best, alpha[:, :-2] + self.skip, out=best)
            alpha[:, 2:] = best + frame[self.states]
        rows = np.arange(len(self.states))
        # The last state is a filler, the one before that of the last phone.
        found: np.ndarray = np.maximum(alpha[rows, 1 + self.sizes], alpha[rows, self.sizes] + self.leave)
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


def _chain(definition: SphinxDefinition, words: Words) -> tuple[list[int], list[float], np.ndarray]:
    """States, and log-probabilities of staying in each and of leaving it for the next."""
    models = iter(definition.models(words))
    states: list[int] = [_FILLER_STATE]
    stay: list[float] = [_STAY]
    go: list[float] = [math.log1p(-math.exp(_STAY))]
    for word in words:
        for _ in word:
            model = next(models)
            transitions = definition.transitions[definition.matrix[model]]
            states += [int(state) for state in definition.states[model]]
            stay += [float(transitions[at, at]) for at in range(3)]
            go += [float(transitions[at, at + 1]) for at in range(3)]
        states.append(_FILLER_STATE)
        stay.append(_STAY)
        go.append(math.log1p(-math.exp(_STAY)))
    return states, stay, np.array(go)
