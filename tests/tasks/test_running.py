"""Perplexity of running text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import modicum
from modicum.errors import InputError
from tests.tasks.counting import only, taken


def test_targets_together_are_the_text(tmp_path: Path, byte_level: Any) -> None:
    text = " ".join(f"word{i}{'.' if i % 7 == 0 else ''}" for i in range(95)).replace(".", ".\n")
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    task = only(f"text:path={path},stride=10")
    assert len(task) == 9
    assert task.metric == "loss"
    samples = [task.sample(i, None, byte_level) for i in range(9)]
    assert samples[0].context + "".join(sample.target for sample in samples) == text.rstrip()
    assert all(sample.context + sample.target in text for sample in samples)
    assert len(samples[-1].target.split()) == 5
    assert all(sample.question == "" and sample.max_new_tokens == 0 for sample in samples)
    with pytest.raises(InputError, match="9 samples"):
        task.sample(9, None, byte_level)


def test_the_context_is_as_long_as_fits(tokenizer: Any) -> None:
    book = modicum.sample_text()
    task = only("text")
    for index, length in ((40, 300), (40, 1000), (100, 777)):
        sample = task.sample(index, length, tokenizer)
        assert length - 12 < taken(tokenizer, sample) <= length
        assert sample.context + sample.target in book
        assert sample.target == task.sample(index, None, tokenizer).target
    with pytest.raises(InputError, match="smaller stride"):
        task.sample(40, 60, tokenizer)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    index=st.integers(0, 2**31 - 2),
    length=st.integers(320, 1200),
    seed=st.integers(0, 99),
    depth=st.sampled_from(["", ",depth=0", ",depth=1"]),
)
def test_the_passage_comes_twice(index: int, length: int, seed: int, depth: str, byte_level: Any) -> None:
    task = only(f"recall:passage=48,cue=6{depth}")
    sample = task.sample(index, length, byte_level, seed)
    ((start, end),) = sample.needles
    passage = sample.context[start:end]
    assert len(passage.split()) == 48
    assert passage.endswith(sample.target)
    cue = passage.removesuffix(sample.target)
    assert sample.context.endswith("\n\n" + cue)
    before = sample.context.removesuffix("\n\n" + cue)
    assert len(cue.split()) == 6
    assert before in modicum.sample_text()
    assert end <= len(before)
    assert length - 12 < taken(byte_level, sample) <= length
    assert sample == task.sample(index, length, byte_level, seed)


def test_the_passage_is_where_it_should_be(tiny: Any) -> None:
    depths = [only("recall").sample(i, 1500, tiny).depth for i in range(20)]
    assert sum(depth < 0.55 for depth in depths) >= 18  # but for passages at the text's end
    assert max(depths) - min(depths) > 0.2
    for depth in (0.0, 0.5):
        found = [only(f"recall:depth={depth}").sample(i, 1500, tiny).depth for i in range(8)]
        assert sorted(found)[4] == pytest.approx(depth, abs=0.03)
    assert len({only("recall").sample(i, 900, tiny).target for i in range(10)}) == 10


def test_what_is_too_short(tmp_path: Path, tiny: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one two three")
    with pytest.raises(InputError, match="3 words, which is not more than the passage's 64"):
        only(f"recall:path={path}").sample(0, 500, tiny)
    with pytest.raises(InputError, match="does not fit into 100"):
        only("recall").sample(0, 100, tiny)
    assert len(only(f"text:path={path}")) == 0
    whole = only(f"recall:path={path},passage=2,cue=1").sample(0, None, tiny)
    assert whole.context.startswith("one two three\n\n")
