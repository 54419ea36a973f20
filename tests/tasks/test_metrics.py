"""Metrics by hand-worked values, and beside the benchmarks' definitions said again in another way."""

from __future__ import annotations

import re
import string
import sys
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.errors import InputError
from modicum.tasks import METRICS, find_metric
from tests.bounds import exactly

CASES: list[tuple[str, str, tuple[str, ...], float]] = [
    ("string_match_all", " 1234567, and 7654321.", ("1234567", "7654321"), 1.0),
    ("string_match_all", "It is 1234567", ("1234567", "7654321", "1", "x"), 0.5),
    ("string_match_all", "THE WORD IS FOX", ("fox",), 1.0),
    ("string_match_all", "", ("fox",), 0.0),
    ("string_match_part", "Paris, of course", ("Lutetia", "paris"), 1.0),
    ("string_match_part", "London", ("Lutetia", "paris"), 0.0),
    ("exact", "The Eiffel-Tower!", ("eiffeltower", "x"), 1.0),
    ("exact", "an Eiffel Tower", ("x", "the eiffel  tower."), 1.0),
    ("exact", "Eiffel Tower in Paris", ("Eiffel Tower",), 0.0),
    # common: red, fox (2); precision 2/4, recall 2/3
    ("qa_f1", "The red fox ran home", ("a red, quick fox",), 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)),
    ("qa_f1", "red red fox", ("red fox fox",), 2 / 3),
    ("qa_f1", "fox", ("hen", "the fox"), 1.0),
    ("qa_f1", "", ("fox",), 0.0),
    ("qa_f1", "fox\nPassage: more words", ("fox",), 0.4),
    ("qa_f1_line", "\n\nfox\nPassage: more words", ("fox",), 1.0),
    # longest common subsequence: the cat on mat (4); precision 4/6, recall 4/5
    ("rouge_l", "the cat sat on a mat", ("The cat, on the mat.",), 2 * (4 / 6) * (4 / 5) / (4 / 6 + 4 / 5)),
    ("rouge_l", "one two", ("three four", "one two"), 1.0),
    ("rouge_l", "", ("one",), 0.0),
    ("rouge_l_line", "\none two\nDialogue: three four", ("one two",), 1.0),
    ("classification", "Date", ("Date", "", "Date", "City", "Food"), 1.0),
    ("classification", "Date or City\nFood", ("Date", "", "Date", "City", "Food"), 0.5),
    ("classification", "Type: Food", ("Date", "", "Date", "City", "Food"), 0.0),
    # "Date" is part of "Date of birth" and does not count
    ("classification", "Date of birth", ("Date of birth", "", "City", "Date", "Date of birth"), 1.0),
    # two parts in a row: the second is passed over and counts, as in the benchmark
    ("classification", "an abc", ("abc", "", "a", "b", "abc"), 0.5),
    ("retrieval", "Paragraph 12", ("Paragraph 12",), 1.0),
    ("retrieval", "Paragraph 12 or 3, 4, 12", ("Paragraph 12",), 0.5),
    ("retrieval", "the first", ("Paragraph 1",), 0.0),
    ("retrieval_zh", "段落7和8", ("段落7",), 0.5),
    ("count", "There are 17 paragraphs, not 20.", ("17",), 0.5),
    ("count", "none", ("17",), 0.0),
    # matching blocks of "return x" and "return y": 7 of 8 letters, 87.5 % rounds (to even) to 88
    ("code_sim", "# a remark\nreturn x\nreturn y", ("return y",), 0.88),
    ("code_sim", "\n\nreturn y", ("return y",), 1.0),
    ("code_sim", "```", ("return y",), 0.0),
    ("multiple_choice", "The correct answer is (B).", ("B",), 1.0),
    ("multiple_choice", "**The correct answer is C**", ("C",), 1.0),
    ("multiple_choice", "The correct answer is (A) or B", ("B",), 0.0),
    ("multiple_choice", "B", ("B",), 0.0),
    ("gsm8k", " 3 + 4 = 7\n#### 1,007\n\nQuestion: x\n#### 8", ("1007",), 1.0),
    ("gsm8k", "#### -12.", ("-12",), 1.0),
    ("gsm8k", "#### 12.5", ("12",), 0.0),
    ("gsm8k", "The answer is 7", ("7",), 0.0),
    ("gsm8k", "#### seven", ("7",), 0.0),
]


@pytest.mark.parametrize(("name", "prediction", "answers", "score"), CASES)
def test_by_hand(name: str, prediction: str, answers: tuple[str, ...], score: float) -> None:
    assert METRICS[name](prediction, answers) == exactly(score)


def test_every_metric_is_worked_by_hand() -> None:
    assert set(METRICS) - {name for name, *_ in CASES} == {
        "qa_f1_zh",
        "rouge_l_zh",
    }  # these need jieba: below


WORDS = st.lists(st.sampled_from(["the", "An", "fox", "Fox.", "hen", "12", "(a)", "ran,"]), max_size=9).map(
    " ".join
)


def normal(text: str) -> list[str]:
    """LongBench's (and SQuAD's) normalisation, letter by letter."""
    kept = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
    return [word for word in kept.split() if word not in ("a", "an", "the")]


@settings(max_examples=200, deadline=None)
@given(prediction=WORDS, answer=WORDS)
def test_f1_and_exact_beside_their_definitions(prediction: str, answer: str) -> None:
    left, right = normal(prediction), normal(answer)
    rest, same = list(right), 0
    for word in left:
        if word in rest:
            rest.remove(word)
            same += 1
    f1 = 2 * same / (len(left) + len(right)) if same else 0.0  # the same as 2PR / (P + R)
    assert METRICS["qa_f1"](prediction, [answer]) == exactly(f1)
    assert METRICS["exact"](prediction, [answer]) == float(left == right)


@settings(max_examples=200, deadline=None)
@given(prediction=WORDS, answer=WORDS)
def test_rouge_beside_its_definition(prediction: str, answer: str) -> None:
    left, right = (re.findall("[a-z0-9]+", text.lower()) for text in (prediction, answer))
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, one in enumerate(left):
        for j, other in enumerate(right):
            longer = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if one == other else longer
    common = table[-1][-1]
    f1 = 2 * common / (len(left) + len(right)) if common else 0.0
    assert METRICS["rouge_l"](prediction, [answer]) == exactly(f1)


@settings(max_examples=200, deadline=None)
@given(
    prediction=st.text("aAbB12 ", max_size=30),
    answers=st.lists(st.text("aAbB12", min_size=1, max_size=3), min_size=1, max_size=4),
)
def test_string_match_beside_its_definition(prediction: str, answers: list[str]) -> None:
    found = [
        any(prediction.lower().startswith(a.lower(), i) for i in range(len(prediction))) for a in answers
    ]
    assert METRICS["string_match_all"](prediction, answers) == exactly(sum(found) / len(found))
    assert METRICS["string_match_part"](prediction, answers) == (1.0 if True in found else 0.0)


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(sorted(METRICS)), prediction=st.text(max_size=40))
def test_every_score_is_from_0_to_1(name: str, prediction: str) -> None:
    if name.endswith("_zh") and name != "retrieval_zh":
        return
    answers = ["Paragraph 1", "段落2"] if not name.startswith("retrieval") else ["Paragraph 1 段落2"]
    assert 0 <= METRICS[name](prediction, answers) <= 1


def test_chinese_words_are_cut_by_jieba(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("jieba")

    def cut(text: str, cut_all: bool) -> list[str]:
        assert not cut_all
        return [text[i : i + 2] for i in range(0, len(text), 2)]

    fake.cut = cut  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jieba", fake)
    # 红色 狐狸 against 红色 母鸡: punctuation goes, one of two words is the same
    assert METRICS["qa_f1_zh"]("红色狐狸。！", ["红色母鸡"]) == exactly(0.5)
    assert METRICS["rouge_l_zh"]("红色狐狸跑了", ["红色跑了"]) == exactly(2 * 2 / (3 + 2))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(InputError, match="pip install jieba"):
        METRICS["qa_f1_zh"]("x", ["x"])
    from modicum.tasks import metrics

    metrics._scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(InputError, match="pip install rouge-score"):
        METRICS["rouge_l"]("x", ["x"])


def test_metrics_are_found_by_name() -> None:
    assert find_metric("qa_f1") is METRICS["qa_f1"]
    with pytest.raises(InputError, match="did you mean rouge_l"):
        find_metric("rougeL")
    with pytest.raises(InputError, match="known are string_match_all"):
        find_metric("zzz")
    with pytest.raises(InputError, match="judges no answer"):
        find_metric("loss")
    with pytest.raises(InputError, match="names no paragraph"):
        METRICS["retrieval"]("1", ["7"])


def test_the_same_scores_whatever_kind_of_sequence() -> None:
    answers: Any = ["fox", "hen"]
    assert all(
        METRICS[name]("fox", answers) == METRICS[name]("fox", tuple(answers))
        for name in ("string_match_all", "exact", "qa_f1", "rouge_l", "classification")
    )
