"""From a model and a memory to a folder that runs within it."""

from __future__ import annotations

import gc
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import modicum
from modicum.cli import app
from modicum.errors import InputError, ModelError
from modicum.fit.entry import fit
from modicum.fit.fit_report import FitReport
from modicum.fit.part import model_nbytes
from modicum.fit.settings import FitSettings, Target
from modicum.kv.cache_settings import cache_settings_of
from modicum.run_settings import FILE, RunSettings
from tests.fit.fitting import CONTEXT, QUICK, tiny
from tests.tiny_model import TINY_MODEL

pytest.importorskip("scipy")

MEMORY = 700_000
"""About half of what the tiny model takes as it is."""


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[FitReport, Path, Path]:
    """The report, the folder, the library."""
    model, tokenizer = tiny()
    work = tmp_path_factory.mktemp("fit")
    target = Target(MEMORY, CONTEXT)
    report = fit(model, tokenizer, None, work / "out", target, QUICK, library=work / "library")
    return report, work / "out", work / "library"


def test_the_folder_holds_what_was_planned_and_no_byte_more(fitted: tuple[FitReport, Path, Path]) -> None:
    report, folder, _ = fitted
    model, tokenizer = modicum.load(folder)
    gc.collect()
    assert model_nbytes(model) == report.weights_nbytes
    cache = modicum.prefill(model, tokenizer, modicum.sample_text()[:500])
    assert cache.seen > CONTEXT
    cache.check_integrity()
    assert cache.nbytes <= cache.budget_nbytes <= report.cache_nbytes
    assert str(cache.policy) == "keydiff"
    assert cache.store.name == report.plan.cache.store
    assert model_nbytes(model) + cache.nbytes <= MEMORY
    assert report.nbytes <= MEMORY < report.dense_nbytes
    assert report.file_bytes == (folder / "packed.safetensors").stat().st_size


def test_the_written_model_is_the_measured_one(fitted: tuple[FitReport, Path, Path]) -> None:
    report, folder, _ = fitted
    model, _ = modicum.load(folder, weights="dense")
    weights = model.state_dict()
    for name, mask in report.masks.items():
        assert not bool(weights[name][~mask].count_nonzero())
    assert report.masks.keys() <= weights.keys()
    removed = {part.split(".")[0] for part, option in report.plan.options.items() if option != "dense"}
    assert {name.split(".")[2] for name in report.masks} == removed


def test_a_call_may_say_otherwise_than_the_folder(fitted: tuple[FitReport, Path, Path]) -> None:
    model, _ = modicum.load(fitted[1])
    cache = modicum.BudgetCache(model, "streamingllm", 64, store="model")
    assert (str(cache.policy), cache.budget.tokens, cache.store.name) == ("streamingllm", 64, "model")
    plain, _ = tiny()
    assert cache_settings_of(plain).budget == 2048


def test_run_needs_no_other_option(fitted: tuple[FitReport, Path, Path]) -> None:
    report, folder, _ = fitted
    done = CliRunner().invoke(app, ["run", "Once upon a time", "--model", str(folder), "-n", "4", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["policy"] == "keydiff"
    assert told["budget"] == f"{report.cache_nbytes} B"


def test_the_command_goes_on_from_the_library(fitted: tuple[FitReport, Path, Path], tmp_path: Path) -> None:
    _, _, library = fitted
    settings = [
        "--context", str(CONTEXT), "--weights", ",".join(QUICK.weights), "--stores", ",".join(QUICK.stores),
        "--policy", "keydiff", "--tasks", "", "--sequences", "3", "--length", "64", "--probes", "2",
        "--probe-length", "128", "--samples", "5", "--candidates", "3", "--library", str(library),
    ]  # fmt: skip
    out = tmp_path / "out"
    command = ["fit", str(TINY_MODEL), "--memory", "690kB", "--out", str(out), *settings]
    before = {path.name: path.stat().st_mtime_ns for path in library.glob("layer-*")}
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["bytes"] <= 690_000
    assert {path.name: path.stat().st_mtime_ns for path in library.glob("layer-*")} == before
    page = (out / "fit.html").read_text(encoding="utf-8")
    assert "What each layer gave up" in page
    assert "4.mlp" in page

    small = CliRunner().invoke(
        app, ["fit", str(TINY_MODEL), "--memory", "100kB", "--out", str(tmp_path / "x"), *settings]
    )
    assert small.exit_code == 2
    assert "the least is" in small.stderr
    assert "at a loss of" in small.stderr
    assert not (tmp_path / "x").exists()

    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2
    assert "is not empty" in again.stderr


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--memory", "much"], "much"),
        (["--context", "0"], "--context|context is 0"),
        (["--weights", "60"], "60"),
        (["--text", "nowhere"], "there is no nowhere"),
        (["--stores", "int3"], "int3"),
    ],
)
def test_bad_input_ends_with_2_and_one_line(wrong: list[str], told: str, tmp_path: Path) -> None:
    base = ["fit", str(TINY_MODEL), "--memory", "1MB", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*base, *wrong])
    assert done.exit_code == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert any(part in done.stderr for part in told.split("|"))


def test_a_text_that_is_too_short_says_how_short(tmp_path: Path) -> None:
    model, tokenizer = tiny()
    text = tmp_path / "short.txt"
    text.write_text("Once upon a time.", encoding="utf-8")
    with pytest.raises(InputError, match=r"the text has .* tokens"):
        fit(model, tokenizer, text, tmp_path / "out", Target(MEMORY, CONTEXT), QUICK)


def test_finetuning_keeps_the_masks(tmp_path: Path) -> None:
    model, tokenizer = tiny()
    text = tmp_path / "text.txt"
    text.write_text(modicum.sample_text()[:3000], encoding="utf-8")
    settings = replace(QUICK, weights=("dense", "50%"), stores=("int8",), samples=0)
    target = Target(MEMORY, CONTEXT)
    report = fit(
        model, tokenizer, text, tmp_path / "out", target, settings,
        library=tmp_path / "library", teacher=str(TINY_MODEL),
    )  # fmt: skip
    assert report.before_finetuning is not None
    assert report.after_finetuning is not None
    assert report.loss == min(report.before_finetuning, report.after_finetuning)
    loaded, _ = modicum.load(tmp_path / "out", weights="dense")
    weights: dict[str, Any] = loaded.state_dict()
    for name, mask in report.masks.items():
        assert not bool(weights[name][~mask].count_nonzero())
    assert not (tmp_path / "out" / "state").exists()


def test_the_least_that_is_named_is_reached(fitted: tuple[FitReport, Path, Path], tmp_path: Path) -> None:
    _, _, library = fitted
    model, tokenizer = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=r"the least is .* \(\d+ bytes\)") as caught:
        fit(model, tokenizer, None, tmp_path / "out", Target(1000, CONTEXT), QUICK, library=library)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    named = re.search(r"\((\d+) bytes\)", str(caught.value))
    assert named is not None
    least = int(named[1])
    with pytest.raises(InputError):
        fit(model, tokenizer, None, tmp_path / "out", Target(least - 1, CONTEXT), QUICK, library=library)
    report = fit(model, tokenizer, None, tmp_path / "out", Target(least, CONTEXT), QUICK, library=library)
    assert report.nbytes == least


def test_damaged_run_settings_are_an_error(tmp_path: Path) -> None:
    assert RunSettings.read(tmp_path) is None
    RunSettings("packed", "float32").write(tmp_path)
    assert RunSettings.read(tmp_path) == RunSettings("packed", "float32")
    (tmp_path / FILE).write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="damaged"):
        RunSettings.read(tmp_path)
    (tmp_path / FILE).write_text('{"format": 99}', encoding="utf-8")
    with pytest.raises(ModelError, match="newer modicum"):
        RunSettings.read(tmp_path)


def test_the_reference_model_keeps_answering(tmp_path: Path) -> None:
    """The embedded model at half of its memory, in few and short probes."""
    model, tokenizer = modicum.load("reference", dtype="bfloat16", device="cpu")
    settings = replace(
        FitSettings(),
        weights=("dense", "50%"),
        stores=("int8",),
        tasks="niah_single_2:max_new_tokens=16",
        sequences=8,
        length=256,
        probes=1,
        probe_length=384,
        samples=0,
        candidates=1,
    )
    out = tmp_path / "out"
    report = fit(model, tokenizer, None, out, Target("6MB", 2048), settings, library=tmp_path / "library")
    assert report.nbytes <= 6_000_000 < report.dense_nbytes
    loaded, _ = modicum.load(out)
    assert loaded.dtype == torch.bfloat16
    made = modicum.BudgetCache(loaded, length=2048)
    assert "calibrated" in str(made.policy)  # the folder brings the profile
    assert made.plan.nbytes <= report.cache_nbytes
    assert model_nbytes(loaded) == report.weights_nbytes
