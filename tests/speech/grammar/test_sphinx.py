"""pocketsphinx's model: its definition and scores beside pocketsphinx's own, and what it runs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from modicum.errors import InputError, ModelError
from modicum.speech import Synthesizer
from modicum.speech.augment import resample
from modicum.speech.grammar import Expression, Grammar, SphinxModel, command_of, export_grammar
from modicum.speech.grammar.letter_to_sound import letter_to_sound
from modicum.speech.grammar.phone_scores import PhoneChains, free_score
from modicum.speech.grammar.sphinx_definition import SphinxDefinition
from modicum.speech.synthesis import Voice
from tests.bounds import unit_roundoff
from tests.speech.grammar.reference import best_path

needs_sphinx = pytest.mark.skipif(find_spec("pocketsphinx") is None, reason="needs pocketsphinx")
needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")

COMMANDS = ("turn on the radio", "open the window", "smalr zelk")


@pytest.fixture(scope="module")
def model() -> SphinxModel:
    return SphinxModel()


@pytest.fixture(scope="module")
def speech() -> Iterator[dict[str, Tensor]]:
    """What two commands sound like."""
    with Synthesizer() as synthesizer:
        found = {}
        for text in COMMANDS[:2]:
            spoken = synthesizer.speak(text, Voice("en-us", "m3", 45, 150))
            found[text] = resample(spoken.samples, spoken.sample_rate, 16_000)
        yield found


def tiny() -> SphinxDefinition:
    """Three phones of three states and a phone in context; numbers have no pattern."""
    chance = np.random.default_rng(0)
    stay = chance.uniform(0.3, 0.8, (4, 3))
    transitions = np.full((4, 3, 4), -np.inf)
    for state in range(3):
        transitions[:, state, state] = np.log(stay[:, state])
        transitions[:, state, state + 1] = np.log1p(-stay[:, state])
    return SphinxDefinition(
        ("A", "B", "SIL"),
        np.arange(12).reshape(4, 3),
        np.arange(4),
        transitions,
        (2,),
        {(1, 0, 2, 2): 3},
    )


def test_scores_are_those_of_a_search_over_the_graph() -> None:
    definition = tiny()
    chance = np.random.default_rng(1)
    scores = chance.normal(-5, 3, (30, 12)).astype(np.float32)
    expressions = [[["A", "B"]], [["A"], ["B", "A"]], [["B"]]]
    found = PhoneChains.of(definition, expressions).scores(scores)
    filler, enter = 12, np.log(0.005)
    wide = np.concatenate([scores, scores[:, 6:9].max(1, keepdims=True)], 1)
    for words, score in zip(expressions, found, strict=True):
        models = definition.models(words)
        states, stay, moves = [filler], [np.log(0.9)], {(-1, 0): enter, (-1, 1): 0.0, (0, 1): np.log(0.1)}
        at = iter(models)
        for word in words:
            for _ in word:
                one = next(at)
                for state in range(3):
                    states.append(int(definition.states[one][state]))
                    stay.append(float(definition.transitions[one, state, state]))
                    moves[len(states) - 1, len(states)] = float(definition.transitions[one, state, state + 1])
            last = len(states) - 1
            go = moves[last, last + 1]
            moves[last, last + 1] = go + enter  # into the filler
            moves[last, last + 2] = go  # past it
            states.append(filler)
            stay.append(np.log(0.9))
            moves[last + 1, last + 2] = np.log(0.1)
        size = len(states)
        leave = moves[size - 2, size]
        moves = {pair: value for pair, value in moves.items() if pair[1] < size}
        ends = best_path(wide, states, stay, moves)
        expected = max(ends[-1], ends[-2] + leave)
        # 30 frames of 3 additions each in float32.
        assert score == pytest.approx(expected, abs=90 * unit_roundoff_32() * abs(expected) * 2)


def test_free_scores_are_those_of_a_loop_of_phones() -> None:
    definition = tiny()
    scores = np.random.default_rng(2).normal(-5, 3, (20, 12)).astype(np.float32)
    states, stay = (
        list(range(9)),
        [float(definition.transitions[p, s, s]) for p in range(3) for s in range(3)],
    )
    moves: dict[tuple[int, int], float] = {(-1, 3 * p): 0.0 for p in range(3)}
    for p in range(3):
        for s in range(2):
            moves[3 * p + s, 3 * p + s + 1] = float(definition.transitions[p, s, s + 1])
        for q in range(3):
            moves[3 * p + 2, 3 * q] = float(definition.transitions[p, 2, 3]) + np.log(0.1)
    ends = best_path(scores, states, stay, moves)
    expected = max(ends[3 * p + 2] + float(definition.transitions[p, 2, 3]) for p in range(3))
    assert free_score(scores, definition) == pytest.approx(expected, rel=1e-12)


def test_too_few_frames_make_minus_infinity() -> None:
    scores = np.zeros((4, 12), np.float32)
    assert np.isinf(PhoneChains.of(tiny(), [[["A", "B"]], [["A"]]]).scores(scores)).tolist() == [True, False]
    assert PhoneChains.of(tiny(), []).scores(scores).shape == (0,)


def test_phones_in_context_are_found_as_pocketsphinx_does() -> None:
    assert tiny().models([["A", "B"]]) == [0, 3]
    assert tiny().models([["A"], ["B"]]) == [0, 3]  # known at a word's end only: another place will do
    assert tiny().models([["B", "A"]]) == [1, 0]


@needs_sphinx
@needs_espeak
def test_what_is_said_scores_far_above_what_is_not(model: SphinxModel, speech: dict[str, Tensor]) -> None:
    for text, samples in speech.items():
        forms = [tuple(model.forms(word)[0] for word in other.split()) for other in speech]
        scores, free = model.score(samples, forms)
        assert list(speech)[int(scores.argmax())] == text
        # e^100 times as likely; the free decode is of phones without context.
        assert scores.max() > scores.min() + 100
        assert free > scores.min()


@needs_sphinx
@needs_espeak
def test_scores_do_not_depend_on_what_was_scored_before(speech: dict[str, Tensor]) -> None:
    first, second = speech.values()
    model = SphinxModel()
    forms = [(model.forms("open")[0],)]
    before = model.score(first, forms)  # the decoder's very first recording
    assert model.score(second, forms)[0] != before[0]
    again = model.score(first, forms)
    assert before[0] == again[0]
    assert before[1] == again[1]


@needs_sphinx
def test_pronunciations_are_the_dictionarys_or_a_guess(model: SphinxModel) -> None:
    assert model.forms("radio") == ("R EY D IY OW",)
    assert len(model.forms("the")) > 1
    with pytest.warns(UserWarning, match="'snowboy' is not in"):
        assert model.forms("snowboy") == ("S N OW B OY",)
    with pytest.raises(InputError, match="no English letters"):
        model.forms("日本")
    assert set(model.forms("radio")[0].split()) <= set(model.symbols)


def test_letters_have_sounds() -> None:
    assert letter_to_sound("smalr") == ("S", "M", "AE", "L", "R")
    assert letter_to_sound("game") == ("G", "EY", "M")
    assert letter_to_sound("city") == ("S", "IH", "T", "IY")
    assert letter_to_sound("coffee") == ("K", "AA", "F", "IY")
    assert letter_to_sound("") == ()


def grammar(units: str, forms: list[tuple[int, tuple[str, ...]]]) -> Grammar:
    expressions = tuple(Expression(command, words) for command, words in forms)
    return Grammar("m", units, (), "d", COMMANDS, expressions, len(COMMANDS), 0.0, 0.0)


def run(folder: Path, samples: Tensor) -> str:
    """What pocketsphinx makes of a recording with an exported grammar."""
    import pocketsphinx

    decoder: Any = pocketsphinx.Decoder(
        hmm=str(Path(pocketsphinx.get_model_path()) / "en-us" / "en-us"),
        jsgf=str(folder / "grammar.jsgf"),
        dict=str(folder / "grammar.dict"),
        loglevel="FATAL",
    )
    decoder.start_utt()
    decoder.process_raw((samples * 32_767).round().numpy().astype(np.int16).tobytes(), full_utt=True)
    decoder.end_utt()
    hypothesis = decoder.hyp()
    return "" if hypothesis is None else command_of(hypothesis.hypstr)


LETTERS = [
    (0, ("turn", "on", "the", "radio")),
    (1, ("open", "the", "window")),
    (2, ("smalr", "zelk")),
    (0, ("tern", "an", "the", "radoo")),
    (1, ("opn", "the wind", "ow")),
]


@needs_sphinx
@needs_espeak
@pytest.mark.parametrize("units", ["graphemes", "arpabet"])
def test_pocketsphinx_runs_an_exported_grammar(
    units: str, speech: dict[str, Tensor], tmp_path: Path, model: SphinxModel
) -> None:
    forms = LETTERS
    if units == "arpabet":
        forms = [
            (command, tuple((model.pronunciations(w) or (" ".join(letter_to_sound(w)),))[0] for w in words))
            for command, words in LETTERS
        ]
    found = export_grammar(grammar(units, forms), tmp_path)
    for text, samples in speech.items():
        assert run(tmp_path, samples) == text
    assert (found.keywords is None) == (units == "arpabet")
    jsgf = found.jsgf.read_text()
    assert "turn__2" in jsgf
    names = {line.split()[0] for line in found.dictionary.read_text().splitlines()}
    used = {
        word
        for line in jsgf.splitlines()
        if line.startswith("<command_")
        for word in line.partition("=")[2].strip(" ;").replace("|", " ").split()
    }
    assert used == names


@needs_sphinx
def test_keywords_are_in_the_models_tokens(tmp_path: Path) -> None:
    found = export_grammar(grammar("graphemes", LETTERS), tmp_path)
    assert found.keywords is not None
    assert found.keywords.read_text().splitlines()[1] == "o p e n ▁ t h e ▁ w i n d o w @open_the_window"


def test_phones_of_another_alphabet_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pocketsphinx has others"):
        export_grammar(grammar("phones", LETTERS), tmp_path)


def test_a_damaged_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        SphinxDefinition.read(tmp_path)
    for data in (b"", b"BMDF" + bytes(200), b"text"):
        (tmp_path / "mdef").write_bytes(data)
        with pytest.raises(ModelError, match="cannot be read"):
            SphinxDefinition.read(tmp_path)


def unit_roundoff_32() -> float:
    import torch

    return unit_roundoff(torch.float32)
