"""`modicum prune --format`: both formats from end to end, on a random model in a folder."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import modicum
from modicum.cli import app
from modicum.weights import packed
from tests.weights.models import SHAPE

FORMATS = ("packed", "dense")
FEW = ["--sequences", "4", "--length", "16"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama, the reference model's tokenizer, and a text to calibrate on."""
    _, tokenizer = modicum.load("reference")
    torch.manual_seed(0)
    shape = {**SHAPE, "vocab_size": len(tokenizer), "intermediate_size": 24, "tie_word_embeddings": True}
    folder = tmp_path_factory.mktemp("source")
    LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.3)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    words = [f"Sentence {n} says that {n} and {n + 1} make {2 * n + 1}." for n in range(200)]
    (folder / "text.txt").write_text(" ".join(words), encoding="utf-8")
    return folder


def command(source: Path, *words: str) -> list[str]:
    return [
        "prune",
        "--model",
        str(source / "model"),
        "--calibration",
        str(source / "text.txt"),
        *FEW,
        *words,
    ]


def run(source: Path, *words: str) -> Any:
    return CliRunner().invoke(app, command(source, *words))


@pytest.mark.parametrize("format", FORMATS)
def test_the_command_writes_a_model_that_loads(format: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(source, "--sparsity", "0.5", "--format", format, "--out", str(out), "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told == json.loads((out / "report.json").read_text(encoding="utf-8"))
    files = list(out.glob("*.safetensors"))
    assert [file.name for file in files] == [packed.FILE if format == "packed" else "model.safetensors"]
    assert told["format"] == format
    assert told["file_bytes"] == sum(file.stat().st_size for file in files)
    assert told["packed_bytes"] == (told["file_bytes"] if format == "packed" else None)
    assert told["achieved"] == pytest.approx(0.5)
    assert told["perplexity_before"] > 1
    assert not (out / "state").exists()
    model, tokenizer = modicum.load(out)
    removed = sum(int((model.state_dict()[row["name"]] == 0).sum()) for row in told["table"])
    assert removed == sum(row["rows"] * row["width"] - row["kept"] for row in told["table"])
    assert modicum.generate(model, tokenizer, "Sentence 1", budget=40, max_new_tokens=4).tokens
    if format == "dense":
        plain = AutoModelForCausalLM.from_pretrained(out)
        tokens = torch.arange(5, 25)[None]
        assert torch.equal(plain(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("format", FORMATS)
def test_what_people_read(format: str, source: Path, tmp_path: Path) -> None:
    done = run(source, "--format", format, "--out", str(tmp_path / "out"))
    assert done.exit_code == 0, done.stderr
    assert f" {format}: {tmp_path / 'out'}" in done.stdout.replace("\n", "")
    assert f"use it as --model {tmp_path / 'out'}" in done.stderr


def test_both_formats_are_the_same_model(source: Path, tmp_path: Path) -> None:
    models = []
    for format in FORMATS:
        done = run(source, "--sparsity", "0.5", "--format", format, "--out", str(tmp_path / format))
        assert done.exit_code == 0, done.stderr
        models.append(modicum.load(tmp_path / format)[0].state_dict())
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "gguf"], "format is 'gguf'; choose one of packed, dense"),
        (["--format", "dense"], "there is no folder to write it to: give --out"),
        (["--format", "dense", "--out", "new", "--budget", "1MiB"], "give --sparsity, or --format packed"),
        (["--out", "{source}/text.txt"], "is a file: give a folder"),
        (["--out", "{source}/model"], "is not empty, it holds config.json: give another folder"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(
    words: list[str], message: str, source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(source, *(word.format(source=source) for word in words))
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["--pattern", "3:7"],
        ["--pattern", "5x3", "--sparsity", "0.5", "--refine", "none"],
        ["--pattern", "2x2", "--sparsity", "0.5"],
        ["--pattern", "2:4", "--layers", "owl"],
        ["--sparsity", "0.01"],
        ["--length", "4000"],
    ],
    ids=" ".join,
)
def test_advice_is_given_as_options_that_help(words: list[str], source: Path) -> None:
    done = run(source, *words)
    assert done.exit_code == 2
    assert "=" not in done.stderr
    found = re.search(r"give .*?(--\w+) ([\w:.]*\w)", done.stderr)
    assert found, done.stderr
    kept = [*words]
    if found[1] in kept:
        kept[kept.index(found[1]) + 1] = found[2]
    else:
        kept += found.groups()
    assert run(source, *kept).exit_code == 0


def test_a_command_that_is_interrupted_leaves_its_state_and_goes_on(source: Path, tmp_path: Path) -> None:
    """SIGINT after the first block: no file of a model, and the same command finishes the work."""
    out = tmp_path / "out"
    stopped = (
        "import os, signal, sys\n"
        "from modicum.weights.state import State\n"
        "save = State.save\n"
        "def first(self, number, *rest):\n"
        "    save(self, number, *rest)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "State.save = first\n"
        "from modicum.cli import main\n"
        "main()\n"
    )
    words = command(source, "--format", "dense", "--out", str(out), "--sparsity", "0.5")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", stopped, *words], capture_output=True, env=environment, text=True
    )
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert done.stderr.endswith("interrupted\n")
    assert [path.name for path in out.iterdir()] == ["state"]
    assert len(list((out / "state").glob("block-*.safetensors"))) == 1
    assert CliRunner().invoke(app, words).exit_code == 0
    whole = tmp_path / "whole"
    assert run(source, "--format", "dense", "--out", str(whole), "--sparsity", "0.5").exit_code == 0
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
