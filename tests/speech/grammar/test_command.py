"""`modicum speech grammar`: learn, search, evaluate, export, and what they say of bad input."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modicum.cli import app
from tests.speech.tones import write_tones

needs_sphinx = pytest.mark.skipif(find_spec("pocketsphinx") is None, reason="needs pocketsphinx")


def command(*words: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    result = CliRunner().invoke(app, ["speech", "grammar", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of tones taken for two commands and for other speech; the model hears some letters."""
    folder = tmp_path_factory.mktemp("grammar")
    by_text: dict[str, int] = {}
    for utterance in write_tones(folder / "tones", 60, seed=3):
        text = "zero" if "a" in utterance.text else "one" if "b" in utterance.text else ""
        place = folder / ("own/" + text if text and by_text.get(text, 0) < 12 else "others")
        place.mkdir(parents=True, exist_ok=True)
        by_text[text] = by_text.get(text, 0) + 1
        utterance.audio.rename(place / utterance.audio.name)
    (folder / "commands.txt").write_text("zero\none\n")
    return folder


def options(data: Path, out: Path) -> list[str | Path]:
    return [
        data / "commands.txt",
        data / "own",
        "--others",
        data / "others",
        "--false-alarms",
        "0.2",
        "--out",
        out,
    ]


@pytest.fixture(scope="module")
def searched(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("searched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODICUM_CACHE", str(out / "cache"))
        code, stdout, stderr = command("search", *options(data, out / "g"))
    assert code == 0, stderr
    assert "original" in stdout
    assert "improved" in stdout
    assert "held out (speakers not known)" in stdout
    assert "modicum speech grammar export" in stderr
    return out / "g"


def test_search_writes_a_grammar_and_a_page(searched: Path) -> None:
    saved = json.loads((searched / "grammar.json").read_text())
    assert saved["commands"] == ["zero", "one"]
    assert saved["model"] == "embedded"
    page = (searched / "report.html").read_text()
    assert "Held-out recordings" in page
    assert "Expressions of each command" in page


def test_evaluate_has_the_rates_of_both_grammars(data: Path, searched: Path, tmp_path: Path) -> None:
    words = (searched, data / "own", "--others", data / "others", "--false-alarms", "0.2")
    code, out, err = command("evaluate", *words, "--page", tmp_path / "e.html", "--json")
    assert code == 0, err
    before, after = json.loads(out)
    assert (before["grammar"], after["grammar"]) == ("original", "improved")
    assert after["equal"]["false_alarms"]["value"] <= 0.2
    assert (tmp_path / "e.html").exists()


@needs_sphinx
def test_export_writes_files_that_are_said(searched: Path, tmp_path: Path) -> None:
    code, out, err = command("export", searched, "--out", tmp_path)
    assert code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "grammar.dict",
        "grammar.jsgf",
        "keywords.txt",
    ]
    assert "grammar.jsgf" in out
    assert "pocketsphinx.Decoder(jsgf=" in err


def test_learn_writes_a_dictionary_that_search_takes(data: Path, tmp_path: Path) -> None:
    code, out, err = command("learn", data / "own", "--out", tmp_path / "d.json")
    assert code == 0, err
    assert "2 words of" in out
    more = ("--dictionary", tmp_path / "d.json", "--json")
    code, out, err = command("search", *options(data, tmp_path / "g"), *more)
    assert code == 0, err
    assert json.loads(out)["commands"] == ["zero", "one"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("--method", "luck"), "--method is 'luck'"),
        (("--threshold", "no"), "--threshold is 'no'"),
        (("--weights", "1,2"), "--weights is '1,2'"),
        (("--false-alarms", "0.001"), "needs 1,000 recordings of other speech"),
        (("--false-alarms", "2"), "false-alarm rate is 2"),
        (("--model", "nowhere"), "holds no recognizer"),
        (("--others", "nowhere"), "nowhere"),
        (("--pieces", "0.1"), "pieces are 0.1 s"),
        (("--dictionary", "nowhere.json"), "no dictionary that can be read"),
        (("--held-out", "1"), "held_out is 1"),
    ],
)
def test_bad_options_are_a_line_and_exit_code_2(
    change: tuple[str, ...], told: str, data: Path, tmp_path: Path
) -> None:
    code, out, err = command("search", *options(data, tmp_path / "g"), *change)
    assert (code, out) == (2, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert told in last
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("zero\nZERO\n", "'zero' is there twice"),
        ("zéro\none\n", "'é' in 'zéro' is not among the 28 letters of embedded"),
        ("", "no command"),
        ("zero\ntwo\n", "no recording of 'two'"),
    ],
)
def test_bad_commands_are_a_line_and_exit_code_2(lines: str, told: str, data: Path, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text(lines)
    code, _, err = command("search", tmp_path / "c.txt", *options(data, tmp_path / "g")[1:])
    assert code == 2
    assert told in err


def test_a_folder_without_audio_is_named(data: Path, tmp_path: Path) -> None:
    words = options(data, tmp_path / "g")
    (tmp_path / "empty").mkdir()
    code, _, err = command("search", words[0], tmp_path / "empty", *words[2:])
    assert code == 2
    assert "has no audio with a text" in err
    code, _, err = command("evaluate", tmp_path / "empty", data / "own", "--others", data / "others")
    assert code == 2
    assert "no grammar that can be read" in err
