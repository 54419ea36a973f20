"""Packing to a budget, and the commands."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from modicum.errors import InputError
from modicum.speech import (
    ConvCtcSettings,
    DfsmnCtcSettings,
    FeatureSettings,
    Recipe,
    Recognizer,
    TokenSet,
    train,
)
from modicum.speech.compact.candidates import fitting_candidates
from modicum.speech.compact.compressed import compress_weights
from modicum.speech.compact.packed_file import save_packed
from modicum.speech.compact.packing import PackSettings, pack
from modicum.speech.compact.pruning import PruningSettings, apply_masks, make_masks
from modicum.speech.compact.refining import RefiningRecipe
from modicum.speech.compact.sanm import SanmSettings
from tests.speech.conftest import TOKENS, Tones
from tests.speech.test_command import command

SANM = SanmSettings(
    subsampling=2,
    width=32,
    num_layers=2,
    num_heads=2,
    hidden=64,
    kernel=7,
    attention_left=6,
    attention_right=2,
)
RECIPE = Recipe(model=SANM, epochs=10, batch_seconds=8, learning_rate=1e-2, spec_augment=False)


@pytest.fixture(scope="module")
def trained(tones: Tones, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packing") / "model"
    train(RECIPE, tones.corpus, TOKENS, out=folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [SANM, ConvCtcSettings(width=48, num_blocks=2), DfsmnCtcSettings(hidden=64, projection=32, num_layers=2)],
    ids=lambda settings: settings.name,
)
@pytest.mark.parametrize("budget", [15_000, 20_000, 30_000, 60_000])
def test_candidates_fit_when_they_are_written(settings: SanmSettings, budget: int, tmp_path: Path) -> None:
    recognizer = Recognizer(settings.build(40, 4), TOKENS, FeatureSettings(), {"about": "x" * 200})
    candidates = fitting_candidates(recognizer, budget)
    assert candidates
    for candidate in candidates:
        assert candidate.nbytes <= budget
        assert candidate.is_new == (candidate.model != settings)
        model = candidate.model.build(40, 4)
        pruning = PruningSettings(candidate.sparsity, candidate.block)
        if candidate.sparsity:
            apply_masks(model, make_masks(model, candidate.sparsity, pruning))
        compact = compress_weights(replace(recognizer, model=model), candidate.bits, candidate.block)
        nbytes = save_packed(compact, tmp_path / candidate.label)
        assert nbytes <= candidate.nbytes <= nbytes + 2048
    assert len({one.label for one in candidates}) == len(candidates)


@pytest.mark.parametrize("budget", [24_000, 40_000, 60_000])
def test_the_widest_that_fits_is_a_candidate(budget: int) -> None:
    settings = SanmSettings(width=64, num_layers=3, num_heads=4, hidden=192)
    recognizer = Recognizer(settings.build(40, 4), TOKENS, FeatureSettings())
    fitting = []
    for width in range(4, 64, 4):
        narrow = replace(settings, width=width, hidden=3 * width)
        model = replace(recognizer, model=narrow.build(40, 4))
        if fitting_candidates(model, 10**6)[0].nbytes <= budget:
            fitting.append(width)
    assert 4 < fitting[-1] < 60
    found = [one for one in fitting_candidates(recognizer, budget) if one.label.startswith("narrow")]
    (dense,) = [one.model for one in found if not one.sparsity]
    assert isinstance(dense, SanmSettings)
    assert dense.width == fitting[-1]


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.3])
def test_many_symbols_and_given_zeros_do_not_break_the_plan(sparsity: float, tmp_path: Path) -> None:
    tokens = TokenSet("graphemes", tuple(chr(0x4E00 + index) for index in range(1000)))
    model = ConvCtcSettings(width=40, num_blocks=6).build(40, tokens.num_classes)
    apply_masks(model, make_masks(model, sparsity, PruningSettings(sparsity)))
    about = {"sparsity": 0.25, "bits": 8, "steps": 10**9, "data": "0" * 16, "taught": True}
    recognizer = Recognizer(model, tokens, FeatureSettings(), about)
    given = next(one for one in fitting_candidates(recognizer, 10**6) if not one.is_new)
    assert (given.bits, given.sparsity) == (8, 0.0)
    assert save_packed(compress_weights(recognizer), tmp_path / "m.safetensors") <= given.nbytes


def test_a_budget_that_nothing_reaches_names_the_smallest() -> None:
    recognizer = Recognizer(SANM.build(40, 4), TOKENS, FeatureSettings())
    with pytest.raises(InputError, match=r"into 1\.0 KiB: the smallest is (narrow|shared)-2-8bit"):
        fitting_candidates(recognizer, 1024)


def test_the_best_trial_is_written_and_a_stopped_search_goes_on(
    tones: Tones, trained: Path, tmp_path: Path
) -> None:
    quick = replace(RECIPE, epochs=2, save_every=3)
    settings = PackSettings(
        30_000, 2, quick, RefiningRecipe(quick, PruningSettings(every=2), quantize_from=0.5)
    )
    recognizer = Recognizer.load(trained)
    b, test = tmp_path / "b.safetensors", tones.test_folder
    whole = pack(recognizer, tones.folder, tmp_path / "a.safetensors", settings, test=test)
    assert 1 <= len(whole) <= 2
    rates = [one.error_rate.value for one in whole]
    assert rates == sorted(rates)
    assert (tmp_path / "a.safetensors").read_bytes() == whole[0].path.read_bytes()
    assert (tmp_path / "a.safetensors").stat().st_size == whole[0].nbytes <= 30_000

    def press(what: str, done: int, total: int) -> None:
        if what == "refining" and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(recognizer, tones.folder, b, settings, test=test, progress=press)
    assert not b.exists()
    again = pack(recognizer, tones.folder, b, settings, test=test)
    assert [one.error_rate for one in again] == [one.error_rate for one in whole]
    other = replace(settings, train=replace(quick, epochs=3))
    with pytest.raises(InputError, match="holds trials of another model, other data or recipes"):
        pack(recognizer, tones.folder, b, other, test=test)


def test_candidates_are_compared_on_speech_that_they_did_not_learn_from(
    tones: Tones, trained: Path, tmp_path: Path
) -> None:
    """Some begin with the weights of the given model, which learned from all of the data."""
    out = tmp_path / "small.safetensors"
    words = ("pack", trained, "--budget", "40KB", "--data", tones.folder, "--out", out)
    code, _, err = command(*words)
    assert (code, "--test" in err) == (2, True)
    rows = [*tones.test.utterances, tones.utterances[3]]
    lines = [json.dumps({"audio": str(row.audio), "text": row.text}) for row in rows]
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines))
    code, _, err = command(*words, "--test", tmp_path / "mixed.jsonl")
    assert (code, err.count("\n")) == (2, 1)
    assert f"1 of the {len(rows)} utterances to compare with are learned from too" in err
    assert not list(tmp_path.glob("small*"))


def test_the_command_packs_and_its_file_is_a_model(tones: Tones, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.safetensors"
    words = ["--epochs", "1", "--refine-epochs", "2", "--batch-seconds", "8", "--no-spec-augment"]
    words += ["--trials", "1", "--data", str(tones.folder), "--out", str(out)]
    words += ["--test", str(tones.test_folder)]
    code, text, err = command("pack", trained, "--budget", "40KB", *words)
    assert code == 0, err
    assert f"use it as --model {out}" in err
    assert f"{out.stat().st_size:,} bytes" in text
    assert out.stat().st_size <= 40_000
    path = tones.test.utterances[0].audio
    code, text, err = command("transcribe", path, "--model", out)
    assert code == 0, err
    assert text.strip() == Recognizer.load(out).transcribe(path).text
    code, text, _ = command("evaluate", tones.test_folder, "--model", f"{out}", "--json")
    assert code == 0
    assert json.loads(text)[0]["num_utterances"] == 10
    code, _, err = command("pack", trained, "--budget", "1KB", *words)
    assert code == 2
    assert "the smallest is" in err
    assert err.count("\n") == 1
    code, _, err = command("pack", trained, "--budget", "3 tons", *words)
    assert code == 2


def test_streams_from_the_command(
    tones: Tones, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tones.test.utterances[1].audio
    recognizer = Recognizer.load(trained)
    streamed = replace(recognizer, features=FeatureSettings(normalization="none"))
    streamed.save(tmp_path / "streamed")
    code, out, err = command("transcribe", "--stream", path, "--model", tmp_path / "streamed")
    assert code == 0, err
    assert out == streamed.transcribe(path).text + "\n"
    code, _, err = command("transcribe", "--stream", path, "--model", trained)
    assert code == 2
    assert "cannot be streamed" in err
    code, _, err = command("transcribe", "--stream", path, "--json", "--model", tmp_path / "streamed")
    assert (code, "leave out --beam, --words and --json" in err) == (2, True)
    code, _, err = command("transcribe", "--model", tmp_path / "streamed")
    assert (code, "there is no file" in err) == (2, True)
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    code, _, err = command("transcribe", "--stream", "--model", tmp_path / "streamed")
    assert code == 2
    assert "pip install sounddevice" in err


def test_a_streamable_model_is_trained_by_the_command(tones: Tones, tmp_path: Path) -> None:
    out = tmp_path / "model"
    words = ("--model", "sanm", "--size", "tiny", "--epochs", "1", "--batch-seconds", "8", "--streamable")
    code, _, err = command("train", tones.folder, "--out", out, *words)
    assert code == 0, err
    recognizer = Recognizer.load(out)
    assert recognizer.features == FeatureSettings(normalization="none", high_frequency=-400)
    path = tones.test.utterances[0].audio
    code, text, err = command("transcribe", "--stream", path, "--model", out)
    assert code == 0, err
    assert text == recognizer.transcribe(path).text + "\n"


def test_only_words_of_a_list_are_written(tones: Tones, tmp_path: Path) -> None:
    tokens = TokenSet("graphemes", (" ", "a", "b", "c"))
    recognizer = Recognizer(SANM.build(40, 5).eval(), tokens, FeatureSettings())
    recognizer.save(tmp_path / "model")
    (tmp_path / "words.txt").write_text("ab\ncab")
    words = ("transcribe", tones.test.utterances[0].audio, "--model", tmp_path / "model", "--words")
    code, text, err = command(*words, tmp_path / "words.txt")
    assert code == 0, err
    assert set(text.split()) <= {"ab", "cab"}
    code, _, err = command(*words, tmp_path / "none")
    assert (code, "cannot read the words" in err) == (2, True)


def test_the_export_command_refuses_what_is_no_model(tmp_path: Path) -> None:
    code, _, err = command("export", tmp_path, "--out", tmp_path / "onnx")
    assert code == 2
    assert "holds no recognizer" in err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PackSettings(0), "the budget is 0 bytes"),
        (lambda: PackSettings(10, trials=0), "for 0 trials"),
    ],
)
def test_bad_settings_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(InputError, match=message):
        make()
