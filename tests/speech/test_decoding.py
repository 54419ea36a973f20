"""Decoding against the enumeration of all paths."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modicum.errors import InputError
from modicum.speech import GreedyDecoder, PrefixBeamSearch, greedy_decode
from modicum.speech.sequence_ensemble import SequenceEnsemble, sequence_log_probs
from tests.bounds import FUNCTION, gamma

cases = st.tuples(st.integers(1, 5), st.integers(2, 4), st.integers(0, 10_000))
"""Frames, classes, a seed."""


def log_probs_of(frames: int, classes: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(frames, classes, generator=generator, dtype=torch.float64)).log_softmax(-1)


def collapsed(path: tuple[int, ...], blank: int = 0) -> tuple[int, ...]:
    """Repeats merged, then blanks removed."""
    return tuple(token for t, token in enumerate(path) if token != blank and (t == 0 or path[t - 1] != token))


def enumerated(log_probs: Tensor, blank: int = 0) -> dict[tuple[int, ...], float]:
    """The log-probability of every token sequence, summed over all paths."""
    rows = log_probs.tolist()
    terms: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for path in product(range(len(rows[0])), repeat=len(rows)):
        terms[collapsed(path, blank)].append(math.exp(math.fsum(rows[t][k] for t, k in enumerate(path))))
    return {tokens: math.log(math.fsum(values)) for tokens, values in terms.items()}


def bound(frames: int, classes: int, value: float) -> float:
    """Of a log-probability: each frame adds at most 2·classes + 2 numbers by log-add, one after another."""
    return gamma(frames * (2 * classes + 2) * 3 * FUNCTION, torch.float64) * (1 + abs(value))


@given(cases)
def test_a_prefix_beam_that_leaves_nothing_out_gives_exact_probabilities(case: tuple[int, int, int]) -> None:
    log_probs = log_probs_of(*case)
    expected = enumerated(log_probs)
    found = PrefixBeamSearch(beam=10_000, num_tokens=0).search(log_probs)
    assert {one.tokens for one in found if one.log_prob > -math.inf} == set(expected)
    for one in found:
        if one.log_prob > -math.inf:
            value = expected[one.tokens]
            assert abs(one.log_prob - value) <= bound(case[0], case[1], value)
    ranked = [one.log_prob for one in found]
    assert ranked == sorted(ranked, reverse=True)


@given(cases, st.integers(1, 4), st.integers(1, 4))
def test_a_narrow_beam_never_says_more_than_the_exact_probability(
    case: tuple[int, int, int], beam: int, num_tokens: int
) -> None:
    log_probs = log_probs_of(*case)
    expected = enumerated(log_probs)
    found = PrefixBeamSearch(beam, num_tokens).search(log_probs)
    assert 1 <= len(found) <= beam
    for one in found:
        if one.log_prob > -math.inf:
            assert one.log_prob <= expected[one.tokens] + bound(case[0], case[1], expected[one.tokens])


@given(cases)
def test_the_blank_may_be_any_class(case: tuple[int, int, int]) -> None:
    log_probs, blank = log_probs_of(*case), case[1] - 1
    expected = enumerated(log_probs, blank)
    search = PrefixBeamSearch(beam=10_000, num_tokens=0, blank=blank)
    for one in search.search(log_probs):
        if one.log_prob > -math.inf:
            value = expected[one.tokens]
            assert abs(one.log_prob - value) <= bound(case[0], case[1], value)
    assert search(log_probs) == list(search.search(log_probs)[0].tokens)


@given(cases)
def test_greedy_decoding_collapses_the_best_path(case: tuple[int, int, int]) -> None:
    log_probs = log_probs_of(*case)
    path = tuple(max(range(case[1]), key=lambda k: row[k]) for row in log_probs.tolist())
    assert greedy_decode(log_probs) == list(collapsed(path)) == GreedyDecoder()(log_probs)


def test_a_beam_finds_what_the_best_path_misses() -> None:
    # Each frame prefers blank, and most paths have an a somewhere: 1 - 0.6² = 0.64.
    log_probs = torch.tensor([[0.6, 0.4], [0.6, 0.4]], dtype=torch.float64).log()
    assert greedy_decode(log_probs) == []
    assert PrefixBeamSearch()(log_probs) == [1]


@given(cases)
def test_sequence_probabilities_are_those_of_the_enumeration(case: tuple[int, int, int]) -> None:
    log_probs = log_probs_of(*case)
    expected = enumerated(log_probs)
    sequences = sorted(expected)
    found = sequence_log_probs(log_probs, sequences)
    for sequence, value in zip(sequences, found.tolist(), strict=True):
        assert abs(value - expected[sequence]) <= bound(case[0], case[1], expected[sequence])
    assert sequence_log_probs(log_probs, [[1] * (case[0] + 1)]).item() == -math.inf


@given(cases, st.integers(1, 3))
def test_an_ensemble_takes_the_candidate_with_the_highest_mean_probability(
    case: tuple[int, int, int], members: int
) -> None:
    frames, classes, seed = case
    outputs = [log_probs_of(frames, classes, seed + 20_000 * member) for member in range(members)]
    tables = [enumerated(one) for one in outputs]
    search = PrefixBeamSearch(beam=3, num_tokens=0)
    candidates = {one.tokens for output in outputs for one in search.search(output)}
    mean = {
        tokens: math.fsum(math.exp(table.get(tokens, -math.inf)) for table in tables) / members
        for tokens in candidates
    }
    chosen = tuple(SequenceEnsemble(search)(outputs))
    # Candidates as near as the errors may change places.
    assert mean[chosen] >= max(mean.values()) * (1 - 2 * bound(frames, classes, 50.0))


def test_an_ensemble_of_one_says_what_its_member_says() -> None:
    log_probs = log_probs_of(5, 4, 3)
    assert SequenceEnsemble()([log_probs]) == greedy_decode(log_probs)


def test_members_that_spike_at_different_frames_agree_on_the_sequence() -> None:
    early = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.9, 0.1]]).log()
    late = early.flip(0)
    # Frame by frame the means are 0.5, 0.9, 0.5 for blank: "11" is as good as "1" or nothing.
    assert SequenceEnsemble()([early, late]) == [1]


@pytest.mark.parametrize(
    ("settings", "message"), [((0, 4), "beam is 0: give 1 or more"), ((3, -1), "num_tokens is -1: give 1 or")]
)
def test_bad_beams_are_refused(settings: tuple[int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PrefixBeamSearch(*settings)
