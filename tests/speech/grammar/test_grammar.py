"""From commands and recordings to a grammar, with a model whose errors are known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from modicum.errors import InputError, ModelError
from modicum.speech.grammar import (
    CandidateSettings,
    Expression,
    Grammar,
    GrammarReport,
    GrammarSettings,
    PronunciationDictionary,
    Recording,
    candidate_expressions,
    check_commands,
    compute_scores,
    evaluate_grammar,
    learn_dictionary,
    original_expressions,
    read_commands,
    read_other_speech,
    read_recordings,
    search_grammar,
    write_evaluation_page,
    write_search_page,
)
from modicum.speech.grammar.dictionary import hear_words
from modicum.speech.grammar.leave_one_out import leave_one_out
from modicum.speech.grammar.recordings import of_commands
from modicum.speech.grammar.score_table import readable
from tests.speech.grammar.models import LetterModel, written

COMMANDS = ("set alarm", "cancel")
HEARD = {
    "set alarm": ["set alom", "set alarm", "set alom"],
    "cancel": ["concel", "concl", "concel", "cancel"],
}
SETTINGS = GrammarSettings(false_alarm_rate=0.1, held_out=0.0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def spoken(tmp_path: Path) -> list[Recording]:
    return [
        written(tmp_path / "audio", heard, text, speaker=f"s{index % 4}")
        for text, forms in HEARD.items()
        for index, heard in enumerate(forms * 5)
    ]


@pytest.fixture
def others(tmp_path: Path) -> list[Recording]:
    near = ["cancels", "cancell", "scancel", "set alarms", "set a larm", "wet alarm"]
    far = [f"{text} {x}" for text in ("table", "cats", "banana", "turn it", "sat", "coral") for x in "abcd"]
    return [written(tmp_path / "others", text, speaker=f"o{index}") for index, text in enumerate(near + far)]


@pytest.fixture
def found(spoken: list[Recording], others: list[Recording]) -> GrammarReport:
    return search_grammar(LetterModel(), COMMANDS, spoken, others, SETTINGS)


def test_a_dictionary_counts_what_was_heard(spoken: list[Recording]) -> None:
    dictionary = learn_dictionary(LetterModel(), spoken)
    assert dictionary.variants("alarm") == [("alom", pytest.approx(2 / 3)), ("alarm", pytest.approx(1 / 3))]
    assert dictionary.variants("cancel", 1) == [("concel", 0.5)]
    assert dictionary.variants("banana") == []


def test_a_dictionary_on_disk_is_the_same(spoken: list[Recording], tmp_path: Path) -> None:
    dictionary = learn_dictionary(LetterModel(), spoken)
    dictionary.save(tmp_path / "d.json")
    assert PronunciationDictionary.load(tmp_path / "d.json") == dictionary
    (tmp_path / "d.json").write_text('{"format": 2}')
    with pytest.raises(InputError, match="format 2"):
        PronunciationDictionary.load(tmp_path / "d.json")
    (tmp_path / "d.json").write_text('{"format": 1}')
    with pytest.raises(InputError, match="no dictionary"):
        PronunciationDictionary.load(tmp_path / "d.json")
    with pytest.raises(InputError, match="missing"):
        PronunciationDictionary.load(tmp_path / "missing.json")


def test_candidates_are_products_by_rank_without_originals(spoken: list[Recording]) -> None:
    model = LetterModel()
    dictionary = learn_dictionary(model, spoken)
    candidates = candidate_expressions(model, COMMANDS, dictionary)
    assert [(one.text, round(one.probability, 3)) for one in candidates] == [
        ("set alom", 0.667),
        ("concel", 0.5),
        ("concl", 0.25),
    ]
    few = candidate_expressions(model, COMMANDS, dictionary, CandidateSettings(num_candidates=1))
    assert [one.text for one in few] == ["set alom", "concel"]


def test_expressions_of_two_commands_that_read_alike_are_left_out() -> None:
    counts = {"four": {"for": 3.0, "fore": 1.0}, "for": {"fore": 1.0, "fir": 1.0}, "on": {"an": 1.0}}
    model = LetterModel()
    dictionary = PronunciationDictionary("letters", "graphemes", model.symbols, model.digest, counts)
    texts = [one.text for one in candidate_expressions(model, ("four", "for"), dictionary)]
    assert texts == ["fir"]


def test_a_word_that_was_never_heard_is_kept_as_it_is(spoken: list[Recording]) -> None:
    model = LetterModel()
    dictionary = learn_dictionary(model, spoken)
    with pytest.warns(UserWarning, match="kept as they are: lights"):
        found = candidate_expressions(model, ("cancel lights",), dictionary)
    assert [one.text for one in found] == ["concel lights", "concl lights"]


def test_long_commands_have_few_products() -> None:
    model = LetterModel()
    counts = {
        word: {f"{word}{a}{b}": 1.0 for a in "abcdefgh" for b in "abcde"}
        for word in ("u", "v", "w", "x", "y")
    }
    dictionary = PronunciationDictionary("letters", "graphemes", model.symbols, model.digest, counts)
    found = candidate_expressions(model, ("u v w x y",), dictionary)
    assert len(found) == 40


def test_a_search_lowers_errors_and_keeps_false_alarms(found: GrammarReport) -> None:
    before, after = found.searched
    assert before.fixed.wrong > 0.2
    assert after.fixed.wrong < before.fixed.wrong / 3
    assert after.fixed.false_alarms.value <= 0.1
    assert {one.text for one in found.grammar.expressions} > {"set alarm", "cancel", "set alom", "concel"}
    assert found.grammar.num_original == 2
    assert found.result.value == pytest.approx(-after.fixed.wrong - after.fixed.false_alarms.value)


@pytest.mark.parametrize("method", ["greedy", "refine", "cem"])
@pytest.mark.parametrize("threshold", ["refit", "fixed"])
def test_all_methods_serve(
    method: str, threshold: str, spoken: list[Recording], others: list[Recording]
) -> None:
    settings = replace(SETTINGS, method=method, threshold=threshold)
    report = search_grammar(LetterModel(), COMMANDS, spoken, others, settings)
    before, after = report.searched
    assert after.fixed.wrong < before.fixed.wrong


def test_the_model_scores_each_recording_once_and_never_again(
    spoken: list[Recording], others: list[Recording]
) -> None:
    model = LetterModel()
    first = search_grammar(model, COMMANDS, spoken, others, SETTINGS)
    assert model.num_scored == len(spoken) + len(others)
    again = search_grammar(model, COMMANDS, spoken, others, SETTINGS)
    assert model.num_scored == len(spoken) + len(others)
    assert again.result == first.result
    assert again.grammar == first.grammar


def test_damaged_scores_are_computed_again(spoken: list[Recording], tmp_path: Path) -> None:
    model = LetterModel()
    expressions = original_expressions(model, COMMANDS)
    table = compute_scores(model, spoken, expressions)
    (path,) = (tmp_path / "cache" / "grammar").iterdir()
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:40] + bytes(40) + whole[80:]):
        path.write_bytes(damaged)
        again = compute_scores(model, spoken, expressions)
        assert np.array_equal(again.scores, table.scores)
    # Other audio in a file of the same name is not taken for the old one.
    written(tmp_path, "banana").audio.replace(spoken[0].audio)
    assert not np.array_equal(compute_scores(model, spoken, expressions).scores, table.scores)


def test_scores_equal_a_new_decode(found: GrammarReport, spoken: list[Recording]) -> None:
    model = LetterModel()
    table = compute_scores(model, spoken, found.grammar.expressions)
    for row, recording in enumerate(spoken):
        scores, _ = model.score(recording.load(16_000), [one.forms for one in found.grammar.expressions])
        assert np.array_equal(table.scores[row], scores)


def test_held_out_recordings_are_measured(
    spoken: list[Recording], others: list[Recording], tmp_path: Path
) -> None:
    report = search_grammar(LetterModel(), COMMANDS, spoken, others, replace(SETTINGS, held_out=0.3))
    assert len(report.held_out) == 2
    seen, seen_others, kept, kept_others = report.num_recordings
    assert (seen + kept, seen_others + kept_others) == (len(spoken), len(others))
    assert report.held_out[0].fixed.missed.total == kept
    assert report.are_speakers_known
    json.dumps(report.to_dict())
    unnamed = [replace(one, speaker="") for one in others]
    report = search_grammar(LetterModel(), COMMANDS, spoken, unnamed, replace(SETTINGS, held_out=0.3))
    assert not report.are_speakers_known
    text = write_search_page(report, tmp_path / "report.html").page.read_text()
    assert "No speaker is in both." not in text
    assert "Not all speakers are known" in text


def test_other_speech_with_texts_is_held_out(spoken: list[Recording], others: list[Recording]) -> None:
    talk = [replace(one, text=f"sentence {row}", speaker="") for row, one in enumerate(others)]
    settings = replace(SETTINGS, held_out=0.3)
    for own in (spoken, [replace(one, speaker="") for one in spoken]):
        report = search_grammar(LetterModel(), COMMANDS, own, talk, settings)
        assert report.num_recordings[3] == round(0.3 * len(talk))
        assert report.held_out


def test_texts_of_recordings_are_taken_in_any_case(
    spoken: list[Recording], others: list[Recording], found: GrammarReport
) -> None:
    titled = [replace(one, text=f" {one.text.title()}") for one in spoken]
    assert [one.text for one in of_commands(titled, COMMANDS)] == [one.text for one in spoken]
    assert search_grammar(LetterModel(), COMMANDS, titled, others, SETTINGS).grammar == found.grammar
    rates = evaluate_grammar(LetterModel(), found.grammar, titled, others, 0.1)
    assert rates[1].fixed.missed.total == len(spoken)


def test_a_warning_says_that_nothing_could_be_held_out(
    spoken: list[Recording], others: list[Recording]
) -> None:
    alone = [replace(one, speaker="one") for one in spoken]
    with pytest.warns(UserWarning, match=r"none of 35 recordings of commands is: .* give recordings of more"):
        report = search_grammar(LetterModel(), COMMANDS, alone, others, replace(SETTINGS, held_out=0.3))
    assert report.held_out == ()


def test_a_grammar_on_disk_is_the_same_and_is_checked(
    found: GrammarReport, spoken: list[Recording], others: list[Recording], tmp_path: Path
) -> None:
    found.grammar.save(tmp_path / "g.json")
    loaded = Grammar.load(tmp_path / "g.json")
    assert loaded.expressions == found.grammar.expressions
    assert loaded.threshold == found.grammar.threshold
    _, rates = evaluate_grammar(LetterModel(), loaded, spoken, others, 0.1)
    assert rates.fixed == found.searched[1].fixed

    class Another(LetterModel):
        name = "another"
        digest = "fedcba9876543210"

    class Phones(LetterModel):
        units = "arpabet"

    with pytest.warns(UserWarning, match="another model's errors"):
        loaded.check(Another())
    with pytest.raises(ModelError, match="writes 27 graphemes"):
        evaluate_grammar(Phones(), loaded, spoken, others, 0.1)
    dictionary = learn_dictionary(LetterModel(), spoken)
    for model, told in ((Another(), "learn it again"), (Phones(), "27 arpabet")):
        with pytest.raises(ModelError, match=told):
            search_grammar(model, COMMANDS, spoken, others, SETTINGS, dictionary=dictionary)
    (tmp_path / "g.json").write_text(
        (tmp_path / "g.json").read_text().replace('"command": 1', '"command": 7')
    )
    with pytest.raises(InputError, match="expression is of no command"):
        Grammar.load(tmp_path / "g.json")


def test_pages_have_rates_curve_and_expressions(
    found: GrammarReport, spoken: list[Recording], others: list[Recording], tmp_path: Path
) -> None:
    page = write_search_page(found, tmp_path / "report.html")
    text = page.page.read_text()
    for part in ("set alom", "concel", "missed", "trade-off", "Commands not understood against false alarms"):
        assert part in text + " ".join(map(str, page.pictures)), part
    rates = evaluate_grammar(LetterModel(), found.grammar, spoken, others, 0.001)
    page = write_evaluation_page(found.grammar, rates, 0.001, tmp_path / "evaluation.html")
    assert "too little other speech" in page.page.read_text()


def test_bad_commands_are_named(tmp_path: Path, spoken: list[Recording], others: list[Recording]) -> None:
    (tmp_path / "c.txt").write_text("# what it does\nTurn  On\n\ncancel\n")
    assert read_commands(tmp_path / "c.txt") == ("turn on", "cancel")
    (tmp_path / "c.txt").write_text("Turn On\nturn  on\n")
    with pytest.raises(InputError, match="'turn on' is there twice"):
        read_commands(tmp_path / "c.txt")
    (tmp_path / "c.txt").write_text("\n# nothing\n")
    with pytest.raises(InputError, match="no command"):
        read_commands(tmp_path / "c.txt")
    with pytest.raises(InputError, match="cannot read"):
        read_commands(tmp_path / "missing.txt")
    with pytest.warns(UserWarning, match="one command"):
        check_commands(["go"])
    with pytest.raises(InputError, match="'é' in 'café'"):
        search_grammar(LetterModel(), ("café", "cancel"), spoken, others, SETTINGS)
    with pytest.raises(InputError, match="no recording of 'open'"):
        search_grammar(LetterModel(), ("open", "cancel"), spoken, others, SETTINGS)
    model = LetterModel()
    with pytest.raises(InputError, match=r"needs 1,000 recordings .* there are 30"):
        search_grammar(model, COMMANDS, spoken, others, replace(SETTINGS, false_alarm_rate=0.001))
    assert model.num_scored == 0  # this is told before the work
    with pytest.warns(UserWarning, match="20 of 35 recordings are of no command"):
        of_commands(spoken, ("set alarm",))


def test_recordings_come_in_folders_and_manifests(tmp_path: Path) -> None:
    for heard, folder in (("ab", "turn_on"), ("cd", "turn_on"), ("ef", "cancel")):
        written(tmp_path / "words" / folder, heard)
    found = read_recordings(tmp_path / "words")
    assert [one.text for one in found] == ["cancel", "turn on", "turn on"]
    assert len(read_other_speech(tmp_path / "words")) == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no audio"):
        read_recordings(tmp_path / "empty")
    with pytest.raises(InputError, match="has no audio"):
        read_other_speech(tmp_path / "empty")
    with pytest.raises(InputError, match="there is no"):
        read_recordings(tmp_path / "missing")
    rows = "".join(
        json.dumps({"audio": str(one.audio), "text": "Turn on", "speaker": "x"}) + "\n" for one in found[:2]
    )
    (tmp_path / "m.jsonl").write_text(rows)
    assert [(one.text, one.speaker) for one in read_recordings(tmp_path / "m.jsonl")] == [
        ("turn on", "x")
    ] * 2


def test_notes_and_hidden_files_are_no_recordings(tmp_path: Path) -> None:
    one = written(tmp_path / "go", "ab")
    (tmp_path / "testing_list.txt").write_text("as Speech Commands has it")
    for name in (".DS_Store", "go/._a.wav", "go/.trash/b.wav", ".git/c.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no audio")
    assert [(found.audio, found.text) for found in read_recordings(tmp_path)] == [(one.audio, "go")]
    assert [found.audio for found in read_other_speech(tmp_path, 2)] == [one.audio]
    one.audio.with_suffix(".txt").write_text("stop")
    with pytest.warns(UserWarning, match="testing_list"):
        assert [found.text for found in read_recordings(tmp_path)] == ["stop"]


def test_a_long_file_is_decoded_once_for_all_its_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modicum.speech.grammar import recordings

    read = []
    decode = recordings.load_audio
    monkeypatch.setattr(recordings, "load_audio", lambda *given: read.append(given) or decode(*given))
    one = written(tmp_path, "abcdefghij" * 52)
    pieces = read_other_speech(tmp_path, 0.5)
    before = [piece.load(16_000) for piece in pieces]
    assert (len(pieces), len(read)) == (6, 1)
    before[0].zero_()
    assert pieces[0].load(16_000).any()
    written(tmp_path / "another", "jihgfedcba" * 26).audio.replace(one.audio)
    assert not np.array_equal(pieces[1].load(16_000), before[1])  # the file has changed since


def test_a_damaged_file_of_other_speech_is_left_out_of_pieces(tmp_path: Path) -> None:
    good = written(tmp_path, "abcdefghij" * 20)
    (tmp_path / "text.wav").write_text("no audio")
    with pytest.warns(UserWarning, match=r"1 of \d+ recordings left out: .*text\.wav"):
        kept = readable(LetterModel(), read_other_speech(tmp_path, 1))
    assert {one.audio for one in kept} == {good.audio}


def test_other_speech_that_is_too_short_for_every_command_sets_no_threshold(
    spoken: list[Recording], others: list[Recording]
) -> None:
    class Slow(LetterModel):
        """Cannot score what is shorter than three letters."""

        digest = "slow"

        def score(self, samples: Tensor, expressions: Sequence[tuple[str, ...]]) -> tuple[np.ndarray, float]:
            scores, free = super().score(samples, expressions)
            return (scores if len(samples) > 1200 else np.full_like(scores, -np.inf)), free

    with pytest.raises(InputError, match=r"30 of 30 recordings of other speech are too short for every"):
        search_grammar(Slow(), COMMANDS, spoken, others, SETTINGS)


def test_a_recording_that_the_model_cannot_take_is_named(tmp_path: Path) -> None:
    class Long(LetterModel):
        def _text(self, samples: Tensor) -> str:
            raise InputError("100 samples make no frame")

    one = written(tmp_path, "a", "cancel")
    for work in (
        lambda: compute_scores(Long(), [one], original_expressions(Long(), COMMANDS)),
        lambda: hear_words(Long(), [one]),
    ):
        with pytest.raises(InputError, match=rf"{one.audio.name}: 100 samples make no frame"):
            work()


def test_other_speech_is_cut_into_pieces(tmp_path: Path) -> None:
    one = written(tmp_path / "long", "abcdefghij" * 52)  # 520 letters of 1 / 160 s: 3.25 s
    pieces = read_other_speech(tmp_path / "long", 1.5)
    assert [(piece.start, piece.end) for piece in pieces] == [(0.0, 1.5), (1.5, 3.0)]  # 0.25 s are left out
    assert np.array_equal(
        np.concatenate([piece.load(16_000) for piece in pieces]), one.load(16_000)[:48_000].numpy()
    )
    with pytest.raises(InputError, match=r"0\.1 s long"):
        read_other_speech(tmp_path / "long", 0.1)


@pytest.mark.parametrize(
    "bad",
    [
        {"false_alarm_rate": 1.0},
        {"method": "luck"},
        {"threshold": "none"},
        {"held_out": 1.0},
        {"num_best": 0},
        {"max_added": -1},
    ],
)
def test_settings_are_checked(bad: dict[str, object]) -> None:
    with pytest.raises(InputError):
        GrammarSettings(**bad)  # type: ignore[arg-type]
    for worse in ({"num_variants": 0}, {"num_candidates": 0}, {"min_length": 2.0}):
        with pytest.raises(InputError):
            CandidateSettings(**worse)  # type: ignore[arg-type]


def test_no_recording_counts_for_what_only_it_gave_rise_to(tmp_path: Path) -> None:
    model = LetterModel()
    recordings = [
        written(tmp_path / "a", heard, "cancel") for heard in ("concel", "cancl", "concel x", "cancel")
    ]
    heard = hear_words(model, recordings)
    expressions = [
        Expression(0, ("cancel",)),
        Expression(0, ("concel",), 0.25),
        Expression(0, ("cancl",), 0.25),
        Expression(0, ("cancel",), 0.25),
    ]
    table = compute_scores(model, recordings, expressions)
    found = leave_one_out(table, heard, expressions, ("cancel",), 1)
    changed = np.argwhere(found.scores != table.scores).tolist()
    # "concel" was heard in the first recording only: the third one's form is longer.
    assert changed == [[0, 1], [1, 2], [3, 3]]
    assert np.isneginf(found.scores[found.scores != table.scores]).all()
    twice = [*recordings, written(tmp_path / "b", "concel", "cancel", "other")]
    table = compute_scores(model, twice, expressions)
    found = leave_one_out(table, hear_words(model, twice), expressions, ("cancel",), 1)
    assert np.argwhere(found.scores != table.scores).tolist() == [[1, 2], [3, 3]]


def test_the_only_form_that_was_heard_does_not_count_for_its_recording(tmp_path: Path) -> None:
    """Of two recordings one is silent to the model, so the other's form has all of the probability."""
    model = LetterModel()
    recordings = [written(tmp_path, "concel", "cancel"), written(tmp_path, " ", "cancel")]
    heard = hear_words(model, recordings)
    expressions = [Expression(0, ("cancel",)), Expression(0, ("concel",), 1.0)]
    table = compute_scores(model, recordings, expressions)
    found = leave_one_out(table, heard, expressions, ("cancel",), 1)
    assert np.argwhere(found.scores != table.scores).tolist() == [[0, 1]]


def test_what_a_single_recording_sounds_like_is_not_chosen(tmp_path: Path, others: list[Recording]) -> None:
    # Each recording is heard in its own way, none near another's: nothing can be learned.
    forms = ("qqqqqq", "wwwwww", "zzzzzz", "jjjjjj", "kkkkkk", "vvvvvv")
    odd = [written(tmp_path / "odd", form, "cancel") for form in forms]
    sure = [written(tmp_path / "sure", "set alarm", "set alarm", str(n)) for n in range(3)]
    with pytest.warns(UserWarning, match=r"fewer than 10 recordings .* 'cancel' \(6\)"):
        report = search_grammar(LetterModel(), COMMANDS, [*odd, *sure], others, SETTINGS)
    assert report.num_candidates == 6
    assert report.result.chosen == ()


def test_a_stopped_run_keeps_the_scores_of_whole_blocks(
    spoken: list[Recording], others: list[Recording]
) -> None:
    many = (spoken + others) * 5  # 325: two blocks
    model = LetterModel()
    expressions = original_expressions(model, COMMANDS)

    def stop(what: str, done: int, total: int) -> None:
        if done == 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute_scores(model, many, expressions, progress=stop)
    assert model.num_scored == 300
    table = compute_scores(model, many, expressions)
    assert model.num_scored == 300 + 325 - 256
    plain = compute_scores(LetterModel(), many, expressions, keep=False)
    assert np.array_equal(table.scores, plain.scores)
    assert np.array_equal(table.reference, plain.reference)


def test_speech_with_words_that_cannot_be_written_is_left_out(tmp_path: Path) -> None:
    model = LetterModel()
    odd = written(tmp_path, "seven", "7")
    with pytest.warns(UserWarning, match=r"1 of \d+ recordings left out: .*'7' in '7'"):
        found = learn_dictionary(model, [odd, written(tmp_path, "concel", "cancel")])
    assert found.counts == {"cancel": {"concel": 1.0}}
    with pytest.raises(InputError, match="nothing was heard in 1 recordings"):
        learn_dictionary(model, [odd])
