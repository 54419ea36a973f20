"""Generated tasks: the answers stand in the context, the length fits exactly, the seed fixes everything."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modicum.errors import InputError
from modicum.tasks import GROUPS, KINDS, parse_task
from modicum.tasks.generated import Generated
from modicum.tasks.haystack import Haystack
from modicum.tasks.measure import largest
from modicum.tasks.needle import DEPTHS
from tests.tasks.counting import only, taken, tokens

NIAH = GROUPS["niah"]
ALL = GROUPS["ruler"]
# For small vocabularies, in which RULER's worked examples alone take thousands of tokens.
SMALL = {"vt": "vt:shots=0", "cwe": "cwe:shots=0"}


def test_the_group_ruler_is_all_generated_kinds() -> None:
    assert len(ALL) == 11
    assert [task.name for task in parse_task("ruler")] == list(ALL)
    assert {kind for kind, cls in KINDS.items() if issubclass(cls, Generated)} == set(ALL)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("length", [1100, 4096])
def test_every_kind_comes_as_near_to_the_length_as_one_more_piece_allows(
    kind: str, length: int, tokenizer: Any
) -> None:
    task = only(SMALL.get(kind, kind))
    sample = task.sample(5, length, tokenizer)
    piece = 120  # a unit of noise, or a needle between UUIDs whose 64 digits are tokens
    if kind == "cwe":
        piece = 40  # three times a number and a word
    elif task.kind.startswith("niah") and task.hay == "essay":
        piece = 12
    elif kind == "fwe":
        piece = 60  # a count may go up for several words at once
    assert length - piece < taken(tokenizer, sample) <= length
    assert sample.question.startswith("\n")
    assert sample.question == sample.question.rstrip()
    assert sample.question == sample.asked + sample.answer_prefix
    assert sample.asked[-1] in "?."
    assert sample.answer_prefix.startswith(" ")
    assert sample.task == task.name
    assert sample.metric == "string_match_all"


@pytest.mark.parametrize("kind", ALL)
def test_not_one_more_unit_would_have_fitted(kind: str, byte_level: Any) -> None:
    task = only(SMALL.get(kind, kind))
    length = 2000
    sample = task.sample(2, length, byte_level, seed=3)
    draft = task.draft(2, length, byte_level, 3)
    n = next(n for n in range(draft.least, 5000) if draft.build(n).text == sample.context)
    while draft.build(n + 1).text == sample.context:  # counts of coded words do not grow at every step
        n += 1
    rest = tokens(byte_level, sample.question, special=False) + sample.max_new_tokens
    assert tokens(byte_level, draft.build(n + 1).text, special=True) + rest > length


@pytest.mark.parametrize("kind", NIAH)
def test_needles_are_the_asked_for_sentences_once_each(kind: str, tokenizer: Any) -> None:
    task = only(kind)
    sample = task.sample(1, 2048, tokenizer)
    assert len(sample.answers) == len(sample.needles) == task.queries * task.values
    told = [sample.context[start:end] for start, end in sample.needles]
    for answer in sample.answers:
        assert sample.context.count(answer) == 1
        assert sum(answer in sentence for sentence in told) == 1
    asked = sample.question.split("?")[0]
    for sentence in told:
        match = re.fullmatch(r"One of the special magic (numbers|uuids) for (.+) is: (.+)\.", sentence)
        assert match
        assert match[2] in asked
    assert sample.depth is not None
    assert 0 <= sample.depth <= 1
    assert sample.needles == tuple(sorted(sample.needles))


@pytest.mark.parametrize("kind", ["niah_multikey_1", "niah_multivalue", "niah_multiquery"])
def test_all_keys_have_their_needles(kind: str, tiny: Any) -> None:
    sample = only(kind).sample(4, 2048, tiny)
    needles = re.findall(r"One of the special magic numbers for (.+?) is: (\d{7})\.", sample.context)
    assert len(needles) == 4
    assert len({key for key, _ in needles}) == (1 if kind == "niah_multivalue" else 4)
    assert len({value for _, value in needles}) == 4


def test_the_wording_of_one_answer_and_of_several(tiny: Any) -> None:
    one = only("niah_single_1").sample(0, 600, tiny)
    key = re.search(r"for (\S+) is: \d+\.", one.context)
    assert key
    assert one.context.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz "
        "you about the number afterwards.\n"
    )
    assert one.question == (
        f"\nWhat is the special magic number for {key[1]} mentioned in the provided text? The special magic "
        f"number for {key[1]} mentioned in the provided text is"
    )
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    lines = one.context.split("\n")[1:]
    assert {line for line in lines if "special magic" not in line} == {noise}
    many = only("niah_multivalue").sample(0, 1000, tiny)
    assert many.context.startswith("Some special magic numbers are hidden within the following text. Make")
    assert many.question.startswith("\nWhat are all the special magic numbers for ")
    assert many.question.endswith(" mentioned in the provided text are")
    four = only("niah_multiquery").sample(0, 1000, tiny)
    assert re.search(r"numbers for .+, .+, .+, and .+ mentioned in the provided text\? The", four.question)


def test_uuid_needles_among_needles(byte_level: Any) -> None:
    sample = only("niah_multikey_3").sample(0, 3000, byte_level)
    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    lines = sample.context.split("\n")[1:]
    assert len(lines) > 10
    assert all(
        re.fullmatch(rf"One of the special magic uuids for {uuid} is: {uuid}\.", line) for line in lines
    )
    assert len(set(re.findall(uuid, sample.context))) == 2 * len(lines)


@pytest.mark.parametrize("hay", ["noise", "essay", "needle"])
def test_a_forced_depth_is_kept(hay: str, byte_level: Any) -> None:
    for depth in (0.0, 0.25, 0.5, 1.0):
        sample = only(f"niah_single_2:hay={hay},depth={depth}").sample(3, 4096, byte_level)
        assert sample.depth == pytest.approx(depth, abs=0.05)
        ((start, end),) = sample.needles
        body = sample.context.index("\n") + 1
        if depth == 0:
            assert start == body
        if depth == 1:
            assert end == len(sample.context)


def test_spread_depths_are_even_and_drawn_ones_are_rulers(byte_level: Any) -> None:
    spread = only("niah_single_2:depth=spread")
    depths = sorted(spread.sample(i, 3000, byte_level).depth for i in range(16))
    assert all(b - a < 0.2 for a, b in pairwise(depths))
    assert depths[0] < 0.1
    assert depths[-1] > 0.85
    assert len(DEPTHS) == 40
    assert DEPTHS[:4] == [0.0, 0.03, 0.05, 0.08]
    assert DEPTHS[-1] == 1.0
    drawn = {only("niah_single_2").sample(i, 800, byte_level).depth for i in range(12)}
    assert len(drawn) > 6


def test_samples_that_differ_in_depth_alone_have_the_same_needle(byte_level: Any) -> None:
    a, b = (only(f"niah_single_2:depth={d}").sample(7, 900, byte_level) for d in (0.1, 0.9))
    assert (a.question, a.answers) == (b.question, b.answers)
    assert a.depth < b.depth


@pytest.mark.parametrize("hay", ["noise", "essay"])
def test_variables_take_their_chains_values(hay: str, tokenizer: Any) -> None:
    task = only(f"vt:hops=3,chains=2,shots=0,hay={hay}")
    sample = task.sample(2, 1500, tokenizer)
    assert len(sample.answers) == 4
    told = [sample.context[start:end] for start, end in sample.needles]
    values: dict[str, str] = {}
    for name, right in re.findall(r"VAR ([A-Z]{5}) = (VAR [A-Z]{5}|\d{5})", sample.context):
        values[name] = values[right[4:]] if right.startswith("VAR") else right  # order must be kept
    assert len(values) == 8
    assert len(set(values.values())) == 2
    wanted = values[sample.answers[0]]
    assert [name for name, value in values.items() if value == wanted] == list(sample.answers)
    assert sample.question == (
        f"\nQuestion: Find all variables that are assigned the value {wanted} in the text above. Answer: "
        "According to the chain(s) of variable assignment in the text above, 4 variables are assigned the "
        f"value {wanted}, they are:"
    )
    assert [line.split()[1] for line in told] == list(sample.answers)


def test_the_worked_example_of_chains_is_right_and_of_rulers_size(byte_level: Any) -> None:
    sample = only("vt").sample(0, 4096, byte_level)
    opening = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    empty, example, rest = sample.context.split(opening)
    assert empty == ""
    names = re.findall(r"VAR ([A-Z]{3}) = (?:VAR|\d)", example)
    value = re.search(r"= (\d{5})\n", example)
    assert value
    assert example.endswith(f"assigned the value {value[1]}, they are: {' '.join(names)}\n\n")
    assert len(names) == 5
    shown = example[: example.index(" they are:") + len(" they are:")]
    assert 420 < tokens(byte_level, opening + shown, special=False) <= 500
    assert not re.search(rf"VAR ({'|'.join(names)}) ", rest)


def test_common_words_are_the_most_common_ones(tokenizer: Any) -> None:
    sample = only("cwe:shots=0").sample(0, 3000, tokenizer)
    listed = re.findall(r"(\d+)\. (.+?)(?= \d+\. |$)", sample.context.split("\n")[1])
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
    counts = Counter(word for _, word in listed)
    top = counts.most_common()
    assert {word for word, _ in top[:10]} == set(sample.answers)
    assert {times for _, times in top[:10]} == {6}
    assert {times for _, times in top[10:]} == {1}
    assert sample.question == (
        "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that "
        "appear most often in the list are:"
    )
    assert sample.needles == ()
    assert sample.depth is None


def test_common_words_at_4096_and_their_example(byte_level: Any) -> None:
    with pytest.raises(InputError, match=r"at least \d+ tokens .* 4096: .*shots=0"):
        only("cwe").sample(0, 4096, byte_level)
    sample = only("cwe:common=4").sample(0, 8192, byte_level)
    example = sample.context.split("\nQuestion: ")[0]
    assert example.startswith("Below is a numbered list of words.")
    shown = Counter(word for _, word in re.findall(r"(\d+)\. (.+?)(?= \d+\. |$)", example.split("\n")[1]))
    assert sorted(set(shown.values())) == [3, 10]
    assert "What are the 4 most common words" in sample.question
    body = sample.context.rsplit("\n", 1)[1]
    counts = Counter(word for _, word in re.findall(r"(\d+)\. (.+?)(?= \d+\. |$)", body))
    assert sorted(set(counts.values())) == [3, 30]
    assert {word for word, times in counts.items() if times == 30} == set(sample.answers)


@pytest.mark.parametrize("length", [500, 900, 1500, 4096])
def test_the_three_frequent_words_are_certain(length: int, tokenizer: Any) -> None:
    sample = only("fwe").sample(1, length, tokenizer)
    opening = (
        "Read the following coded text and track the frequency of each coded word. Find the three most "
        "frequently appeared coded words. "
    )
    assert sample.context.startswith(opening)
    counts = Counter(sample.context.removeprefix(opening).split(" "))
    (dots, most), *others = counts.most_common()
    assert dots == "..."
    assert tuple(word for word, _ in others[:3]) == sample.answers
    assert others[2][1] > (others[3][1] if len(others) > 3 else 0)
    # k^-2 / zeta(2): 61 %, 15 %, 7 % and 4 % of the words, rounded down
    n = most / 0.6079
    assert [times for _, times in others[:3]] == pytest.approx([n / 6.58, n / 14.8, n / 26.3], abs=1.1)


def test_no_size_of_coded_text_has_a_tie_for_the_third_place(byte_level: Any) -> None:
    draft = only("fwe").draft(0, 2000, byte_level, 0)
    for n in range(draft.least, 200):  # at 42 to 52 words the fourth would be as frequent, had we not cut
        words = draft.build(n).text.split("words. ")[1].split(" ")
        counts = Counter(word for word in words if word != "...")
        (*_, third), fourth = counts.most_common(3), counts.most_common(4)[3:]
        assert third[1] > (fourth[0][1] if fourth else 0), n


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    kind=st.sampled_from(ALL),
    index=st.integers(0, 2**31 - 2),
    length=st.integers(900, 3000),
    seed=st.integers(0, 2**40),
)
def test_any_sample_is_the_same_again_fits_and_has_its_answers(
    kind: str, index: int, length: int, seed: int, byte_level: Any
) -> None:
    task = only(SMALL.get(kind, kind) + (",max_new_tokens=20" if kind in SMALL else ":max_new_tokens=20"))
    sample = task.sample(index, length, byte_level, seed)
    assert taken(byte_level, sample) <= length
    assert sample == task.sample(index, length, byte_level, seed)
    assert all(answer in sample.context for answer in sample.answers)
    for start, end in sample.needles:
        assert any(answer in sample.context[start:end] for answer in sample.answers)


@pytest.mark.parametrize("kind", ALL)
def test_index_seed_and_length_make_different_samples(kind: str, byte_level: Any) -> None:
    task = only(SMALL.get(kind, kind))
    first = task.sample(0, 1500, byte_level)
    for index, length, seed in ((1, 1500, 0), (0, 1500, 1), (0, 1600, 0)):
        assert task.sample(index, length, byte_level, seed).answers != first.answers


def test_a_sample_never_changes(byte_level: Any) -> None:
    sample = only("niah_multikey_1").sample(0, 1024, byte_level)
    assert sample.answers == ("2152791",)
    assert only("vt:shots=0").sample(0, 1024, byte_level).answers[0] == "OCSMG"


def test_text_of_a_folder_is_the_haystack_and_comes_again_if_short(tmp_path: Path, byte_level: Any) -> None:
    (tmp_path / "b.txt").write_text("Dr. Fox ran home.  He slept!\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text('The hen\nsat. "Who is it?" she asked.', encoding="utf-8")
    (tmp_path / "c.md").write_text("Not this.", encoding="utf-8")
    sample = only(f"niah_single_2:haystack={tmp_path},depth=0").sample(0, 1000, byte_level)
    text = sample.context[sample.needles[0][1] + 1 :]
    once = 'The hen sat. "Who is it?" she asked. Dr. Fox ran home. He slept! '
    assert text.startswith(once * 3)
    assert "Not this" not in text
    assert taken(byte_level, sample) >= 996
    one = only(f"niah_single_2:haystack={tmp_path / 'b.txt'},depth=1").sample(0, 500, byte_level)
    assert "hen" not in one.context
    # the path is no part of the seed
    assert one.answers != sample.answers
    assert only("niah_single_2").sample(0, 500, byte_level).answers == one.answers


def test_sentences_and_their_words() -> None:
    hay = Haystack.of('One two. "Three," said Mr. Four. He is J. Five!\n\nSix? "Seven." Eight')
    assert hay.sentences == (
        "One two.",
        '"Three," said Mr. Four.',
        "He is J. Five!",
        "Six?",
        '"Seven."',
        "Eight",
    )
    assert hay.ends == (2, 6, 10, 11, 12, 13)
    assert hay.first(0) == []
    assert hay.first(5) == ["One two.", '"Three," said Mr.']
    assert hay.first(6) == list(hay.sentences[:2])
    assert hay.first(15) == [*hay.sentences, "One two."]
    assert hay.first(27) == [*hay.sentences, *hay.sentences, "One"]


@settings(max_examples=120, deadline=None)
@given(
    steps=st.lists(st.integers(0, 50), min_size=1, max_size=200),
    low=st.integers(0, 5),
    room=st.integers(0, 4000),
)
def test_the_search_finds_the_largest_that_fits(steps: list[int], low: int, room: int) -> None:
    sizes = [sum(steps[: i + 1]) for i in range(len(steps))]
    high = low + len(sizes) - 1
    fitting = [low + i for i, size in enumerate(sizes) if size <= room]
    found = largest(lambda n: sizes[n - low], room, low, high)
    assert found == (fitting[-1] if fitting else None)


def test_the_search_measures_little() -> None:
    asked: list[int] = []

    def size(n: int) -> int:
        asked.append(n)
        return 31 + 23 * n + n % 7

    found = largest(size, 1_000_000, 1, 2**24)
    measured = len(asked)
    assert found is not None
    assert size(found) <= 1_000_000 < size(found + 1)
    assert measured < 14


@pytest.mark.parametrize(
    ("text", "length", "index", "said"),
    [
        ("niah_single_1", None, 0, "give one in tokens"),
        ("niah_single_1", 100, 0, r"at least \d+ tokens .* the length is 100"),
        ("vt", 200, 0, "shots=0"),
        ("fwe", 1000, -1, "not -1"),
        ("niah_single_2:haystack=/no/such/place", 1000, 0, "there is no text '/no/such/place'"),
    ],
)
def test_what_cannot_be_drawn(text: str, length: int | None, index: int, said: str, byte_level: Any) -> None:
    with pytest.raises(InputError, match=said):
        only(text).sample(index, length, byte_level)


def test_unreadable_haystacks(tmp_path: Path, byte_level: Any) -> None:
    with pytest.raises(InputError, match=r"no \.txt file"):
        only(f"niah_single_2:haystack={tmp_path}").sample(0, 1000, byte_level)
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe bad")
    with pytest.raises(InputError, match="not UTF-8"):
        only(f"niah_single_2:haystack={tmp_path}").sample(0, 1000, byte_level)
    (tmp_path / "x.txt").write_text(" \n")
    with pytest.raises(InputError, match="empty"):
        only(f"niah_single_2:haystack={tmp_path}").sample(0, 1000, byte_level)


@pytest.mark.parametrize("hay", ["essay", "noise", "needle"])
def test_each_key_of_a_context_is_asked_in_turn(hay: str, tokenizer: Any) -> None:
    task = only(f"niah_multikey_1:each=true,hay={hay}")
    assert (task.questions, task.name) == (
        4,
        "niah_multikey_1:each=true" if hay == "essay" else f"niah_multikey_1:hay={hay},each=true",
    )
    samples = [task.sample(index, 1100, tokenizer) for index in range(8)]
    assert len({s.context for s in samples[:4]}) == len({s.context for s in samples[4:]}) == 1
    assert samples[0].context != samples[4].context
    assert len({s.answers for s in samples}) == len({s.question for s in samples}) == 8
    for sample in samples:
        ((start, end),) = sample.needles
        assert sample.answers[0] in sample.context[start:end]
    assert max(taken(tokenizer, s) for s in samples[:4]) <= 1100


@pytest.mark.parametrize("bad", ["keys=1", "queries=2", "depth=0.5"])
def test_each_wants_several_keys_and_one_query(bad: str) -> None:
    with pytest.raises(InputError, match="each=true"):
        parse_task(f"niah_multikey_1:each=true,{bad}")
