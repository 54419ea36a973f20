"""Error rates against a plain edit distance, and their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import InputError
from modicum.speech import Rate, character_error_rate, word_error_rate

texts = st.lists(st.sampled_from(["a", "b", "ab", "ba"]), min_size=1, max_size=6).map(" ".join)
maybe_empty = st.one_of(st.just(""), texts)


def distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein's, by its table."""
    table = [[i + j if not i * j else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            changed = table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
            table[i][j] = min(changed, table[i - 1][j] + 1, table[i][j - 1] + 1)
    return table[-1][-1]


@given(st.lists(st.tuples(texts, maybe_empty), min_size=1, max_size=4))
def test_rates_are_edit_distances_by_reference_lengths(pairs: list[tuple[str, str]]) -> None:
    references, hypotheses = [r for r, _ in pairs], [h for _, h in pairs]
    words = word_error_rate(references, hypotheses)
    assert words.count == sum(distance(r.split(), h.split()) for r, h in pairs)
    assert words.total == sum(len(r.split()) for r in references)
    assert words.value == words.count / words.total
    characters = character_error_rate(references, hypotheses)
    assert characters.count == sum(distance(r, h) for r, h in pairs)
    assert characters.total == sum(map(len, references))
    for rate in (words, characters):
        assert 0 <= rate.low <= rate.high


def test_an_interval_holds_the_value_and_narrows_with_more_utterances() -> None:
    few, many = Rate.of([0, 1] * 5, [2] * 10), Rate.of([0, 1] * 500, [2] * 1000)
    for rate in (few, many):
        assert rate.low <= rate.value == 0.25 <= rate.high
    assert many.high - many.low < few.high - few.low
    alike = Rate.of([1] * 9, [4] * 9)
    assert alike.low == alike.value == alike.high == 0.25


def test_an_empty_reference_counts_what_was_said_too_much() -> None:
    assert word_error_rate(["", "a b"], ["a", "a b"]).count == 1


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="there are 1 references and 2 hypotheses"):
        word_error_rate(["a"], ["a", "b"])
    with pytest.raises(InputError, match="the references hold no words"):
        character_error_rate([""], ["a"])
