"""`modicum calibrate`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modicum import HeadProfile, sample_text
from modicum.cli import app
from tests.tiny_model import TINY_MODEL

QUICK = ["calibrate", str(TINY_MODEL), "--tokens", "48", "--texts", "2"]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_calibration_is_kept_and_the_next_run_uses_it(cache_folder: Path) -> None:
    prompt = ["run", "--model", str(TINY_MODEL), "once upon a time " * 40, "-b", "50", "-n", "2"]
    before = CliRunner().invoke(app, prompt)
    assert f"modicum calibrate {TINY_MODEL}" in before.stdout.replace("\n", " ")
    done = CliRunner().invoke(app, QUICK)
    assert done.exit_code == 0, done.output
    assert "share of its tokens" in done.stdout
    (kept,) = cache_folder.rglob("*.safetensors")
    assert str(kept) in done.stderr.replace("\n", "")
    after = CliRunner().invoke(app, [*prompt, "--json"])
    held = json.loads(after.stdout)["held"]
    assert held["min"] < held["max"]
    assert "modicum calibrate" not in CliRunner().invoke(app, prompt).stdout


def test_json_and_a_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text(sample_text()[:3000], encoding="utf-8")
    out = tmp_path / "profile.safetensors"
    done = CliRunner().invoke(app, [*QUICK, "--text", str(tmp_path / "texts"), "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    profile = HeadProfile.load(out)
    assert told["weights"] == profile.weights
    assert told["texts"] == profile.texts == 2
    assert len(told["shares"]) == len(profile.fractions)
    policy = f'calibrated(keydiff, profile="{out}")'
    prompt = ["run", "--model", str(TINY_MODEL), "once upon a time " * 40, "-b", "50", "-n", "2"]
    assert CliRunner().invoke(app, [*prompt, "--policy", policy]).exit_code == 0


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\xff\xfe")
    for more, says in (
        (["--text", str(tmp_path / "empty")], "holds no text files to calibrate on"),
        (["--text", str(tmp_path / "none.txt")], "to calibrate on: give a text file"),
        (["--text", str(tmp_path / "short.txt")], "too short: give at least one of 32 tokens"),
        (["--text", str(tmp_path / "picture.txt")], "is not UTF-8 (byte 0)"),
        (["--tokens", "9"], "pieces of 9 tokens are too short"),
        (["--out", str(tmp_path / "none/p")], "there is no folder"),
    ):
        done = CliRunner().invoke(app, [*QUICK, *more])
        assert done.exit_code == 2
        assert done.stdout == ""
        assert says in done.stderr.replace("\n", " ")
        assert not list(tmp_path.rglob("*.safetensors"))
