"""`modicum prune` as a user runs it, and the model it gives under a cache budget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import modicum
from modicum.cli import app
from modicum.errors import InputError
from modicum.weights import packed, save
from modicum.weights.entry import packed_bytes
from tests.tiny_model import TINY_MODEL

FEW = ["--sequences", "6", "--length", "64"]


def prune(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["prune", "--model", str(TINY_MODEL), *FEW, *words])
    return done.exit_code, done.stdout, done.stderr


def test_the_command_writes_a_smaller_model_that_runs_under_a_cache_budget(tmp_path: Path) -> None:
    code, out, err = prune(
        "--sparsity", "0.6", "--refine", "swap", "--out", str(tmp_path / "small"), "--json"
    )
    assert code == 0, err
    told = json.loads(out)
    assert told["achieved"] == pytest.approx(0.6, abs=0.02)
    assert all(row["error_refined"] <= row["error_before"] for row in told["table"])
    assert (tmp_path / "small" / packed.FILE).stat().st_size == told["packed_bytes"] < told["dense_bytes"]
    assert not (tmp_path / "small" / "state").exists()
    model, tokenizer = modicum.load(tmp_path / "small")
    header, tensors = packed.read(tmp_path / "small")
    for name, weight in packed.dense(header, tensors).items():
        assert torch.equal(model.state_dict()[name], weight)
    light, _ = modicum.load(tmp_path / "small", weights="packed")
    held = sum(t.nbytes for t in [*light.parameters(), *light.buffers()])
    assert held < sum(p.nbytes for p in model.parameters())
    answers = [
        modicum.generate(
            lm, tokenizer, "Once upon a time", policy="keydiff", budget=40, max_new_tokens=60
        ).text
        for lm in (model, light)
    ]
    assert answers[0] == answers[1]
    assert len(answers[0]) > 20


def test_the_table_for_people() -> None:
    code, out, _ = prune("--method", "sparsegpt", "--refine", "none", "--pattern", "2:4")
    assert code == 0
    assert "perplexity of held-back text" in out
    assert "50.0%" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sparsity", "1.2"], "sparsity is 1.2"),
        (["--method", "wonda"], "choose one of magnitude"),
        (["--calibration", "nowhere"], "there is no nowhere to calibrate on"),
        (["--sequences", "4000"], "give more text"),
        (["--budget", "1KiB"], "below"),
        (["--budget", "1MiB", "--sparsity", "0.5"], "not both"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str) -> None:
    code, _, err = prune(*words)
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("budget", ["600KiB", "900KiB"])
def test_a_budget_in_bytes_is_the_files(budget: str, tmp_path: Path) -> None:
    model, tokenizer = modicum.load(TINY_MODEL, dtype="float32")
    text = modicum.sample_text()
    report = modicum.prune(
        model, text, tokenizer=tokenizer, budget=budget, refine=None, sequences=4, length=64
    )
    size = save(report, model, tokenizer, tmp_path)
    most = int(budget[:-3]) * 1024
    assert most * 0.98 < size <= most
    assert packed_bytes(model, report.sparsity) >= size


def test_calibration_that_cannot_be_used() -> None:
    model, tokenizer = modicum.load(TINY_MODEL)
    with pytest.raises(InputError, match="give the tokenizer"):
        modicum.prune(model, "text", sparsity=0.5)
    with pytest.raises(InputError, match="whole numbers"):
        modicum.prune(model, torch.zeros(2, 3), sparsity=0.5)
    with pytest.raises(InputError, match="fewer sequences"):
        modicum.prune(model, "Once upon a time", tokenizer=tokenizer, sparsity=0.5)
