"""Runs that are killed, grown, repeated: no sample is lost, done twice, or different."""

from __future__ import annotations

import json
import math
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from modicum.errors import BudgetError, InputError
from modicum.evaluation.evaluate import Progress, evaluate
from modicum.evaluation.fingerprint import fingerprint
from modicum.evaluation.grid import Grid
from modicum.evaluation.row import Row
from modicum.evaluation.runner import Reading
from modicum.evaluation.store import read_rows
from modicum.loading import load
from tests.evaluation.colours import METRICS, Colours, Continued, Twice
from tests.evaluation.victim import work
from tests.tiny_model import TINY_MODEL, VOCAB_SIZE

ROOT = Path(__file__).resolve().parents[2]
SMALL = Grid(
    models=(str(TINY_MODEL),),
    policies=("keydiff",),
    budgets=("32",),
    tasks=("colours",),
    lengths=(100,),
    limit=2,
    chunk=32,
    recent=8,
)


def small(folder: Path, tasks: Any = None, load: Any = None, progress: Any = None, **more: Any) -> list[Row]:
    tasks = [Colours()] if tasks is None else tasks
    return evaluate(
        replace(SMALL, **more), folder, tasks=tasks, metrics=METRICS, load=load, progress=progress
    )


def timeless(rows: list[Row]) -> list[Row]:
    return [
        replace(row, prefill_seconds=0, decode_seconds=0, extra=row.extra | {"threads": 0}) for row in rows
    ]


def lines(folder: Path) -> int:
    path = folder / "rows.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_never_was(tmp_path: Path) -> None:
    whole = work(tmp_path / "whole")
    folder, rng, deaths = tmp_path / "killed", random.Random(0), 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-m", "tests.evaluation.victim", str(folder)], cwd=ROOT)
        wanted = lines(folder) + rng.randint(1, len(whole) // 5)
        while lines(folder) < wanted and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05)  # anywhere in a sample
        process.send_signal(signal.SIGKILL)
        deaths += process.wait() == -signal.SIGKILL
        assert len(read_rows(folder)) == lines(folder) >= wanted
    assert deaths == 3
    assert lines(folder) < len(whole)
    resumed = work(folder)
    assert timeless(resumed) == timeless(whole)
    assert len({(row.cell, row.index) for row in read_rows(folder)}) == len(read_rows(folder)) == len(whole)
    before = (folder / "rows.jsonl").read_bytes()
    assert work(folder) == resumed  # nothing is left to do
    assert (folder / "rows.jsonl").read_bytes() == before


def test_a_folder_grows_by_what_is_added_only(tmp_path: Path) -> None:
    done: list[Progress] = []
    first = small(tmp_path)
    assert len(first) == 2
    more = small(
        tmp_path,
        policies=("keydiff", "h2o"),
        budgets=("32", "full"),
        lengths=(100, 120),
        limit=3,
        progress=done.append,
    )
    assert (done[0].done, done[0].total, done[0].seconds_left) == (2, 18, None)
    assert (done[-1].done, done[-1].total, done[-1].seconds_left) == (18, 18, 0.0)
    assert all((p.seconds_left or 0) > 0 for p in done[1:-1])
    assert len(more) == lines(tmp_path) == 18
    assert [row for row in more if row in first] == first
    assert small(tmp_path) == first  # of the folder, what was asked for
    assert len(json.loads((tmp_path / "grid.json").read_text())["grids"]) == 2


def test_one_setting_after_the_other_for_each_sample(tmp_path: Path) -> None:
    rows = small(tmp_path, policies=("keydiff", "full"), budgets=("32", "40"), questions=("hidden", "seen"))
    assert [row.index for row in rows] == [0] * 6 + [1] * 6
    assert [row.cell.budget for row in rows] == ["full", "32", "40"] * 4
    assert len({row.context_tokens for row in rows if row.index == 0}) == 1


def test_ctrl_c_keeps_what_was_done(tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small(tmp_path, progress=stop)
    assert lines(tmp_path) == 1
    assert timeless(small(tmp_path)) == timeless(small(tmp_path / "again"))


def test_a_model_that_has_changed_is_not_mixed_in(tmp_path: Path) -> None:
    small(tmp_path)

    def other(name: str, dtype: str) -> Any:
        model, tokenizer = load(name, dtype=dtype)
        with torch.no_grad():
            model.lm_head.weight[-1, -1] += 0.5
        return model, tokenizer

    with pytest.raises(InputError, match=f"another model named {re.escape(str(TINY_MODEL))} float32"):
        small(tmp_path, load=other)
    assert lines(tmp_path) == 2


def test_data_that_has_changed_is_not_mixed_in(tmp_path: Path) -> None:
    small(tmp_path)
    with pytest.raises(InputError, match="other samples of colours"):
        small(tmp_path, [Colours(new_tokens=7)])


def test_a_fingerprint_is_of_the_model_not_of_how_it_was_loaded(tiny: Any) -> None:
    model, tokenizer = tiny
    mark = fingerprint(model, tokenizer)
    assert fingerprint(*load(TINY_MODEL, dtype="float64")) == mark
    assert fingerprint(*load(TINY_MODEL)) == mark
    changed, _ = load(TINY_MODEL)
    changed.config.rope_parameters["rope_theta"] *= 2
    assert fingerprint(changed, tokenizer) != mark


def test_a_loss_is_stored_like_a_score(tmp_path: Path) -> None:
    rows = small(tmp_path, [Continued()], questions=("hidden", "seen"), limit=9)
    assert [row.index for row in rows] == [0, 1, 2]  # as many as there are
    assert {row.metric for row in rows} == {"loss"}
    assert all(0 < row.score < 2 * math.log(VOCAB_SIZE) for row in rows)  # random weights guess


@pytest.mark.parametrize(
    ("more", "error", "says"),
    [
        ({"lengths": (100, 513)}, InputError, r"513 is beyond the 512 positions of \S+: give lengths up to"),
        ({"budgets": ("32", "11")}, BudgetError, "at least 12"),
        ({"policies": ("keydiff", "snapkv")}, BudgetError, "32 recent tokens"),
        ({"budgets": ("1kB",)}, BudgetError, "give at least"),
        ({"lengths": (100, 50)}, InputError, "needs 80 tokens"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is(
    tmp_path: Path, more: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        small(tmp_path, **more)
    assert lines(tmp_path) == 0
    assert not (tmp_path / "grid.json").exists()


def test_renumbered_samples_may_be_longer_than_the_models_positions(tmp_path: Path) -> None:
    """As no rank goes there, but where the full cache is asked for too."""
    rows = small(tmp_path / "a", lengths=(700,), limit=1, policies=("keydiff",), positions="renumbered")
    assert [row.context_tokens > 600 for row in rows] == [True] * len(rows)
    assert {row.cell.positions for row in rows} == {"renumbered"}
    with pytest.raises(InputError, match="700 is beyond the 512 positions"):
        small(tmp_path / "b", lengths=(700,), policies=("full", "keydiff"), positions="renumbered")


def test_an_unknown_metric_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'taste'.*has, steps and loss"):
        small(tmp_path, [Colours(metric="taste")])


def test_a_task_beyond_the_positions_by_its_own_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give a length of at most 512"):
        small(tmp_path, [Colours(greedy=600)], lengths=(100,), limit=1)


@pytest.mark.parametrize("question", ["hidden", "seen"])
def test_questions_on_one_context_are_answered_as_if_each_had_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, question: str
) -> None:
    """The context is read once, where the question is hidden, and again only by what was cut short."""
    grid: dict[str, Any] = {
        "limit": 5,
        "policies": ("keydiff", "snapkv(window=8)", "full"),
        "questions": (question,),
    }
    read: list[int] = []
    of = Reading.of.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(
        Reading,
        "of",
        classmethod(lambda cls, *given: read.append(1) or of(cls, *given)),  # type: ignore[func-returns-value]
    )
    apart = small(tmp_path / "apart", [replace(Twice(), questions=1)], **grid)
    assert len(read) == len(apart) == 15
    read.clear()
    together = small(tmp_path / "together", [Twice()], **grid)
    assert len(read) == (9 if question == "hidden" else 15)
    assert placed(together) == placed(apart)
    begun = tmp_path / "begun"
    small(begun, [Twice()], **grid | {"limit": 1})
    assert placed(small(begun, [Twice()], **grid)) == placed(apart)


def placed(rows: list[Row]) -> dict[Any, Row]:
    """By setting and sample; without a full cache's bytes: it has room for the context's longest question."""
    found = {}
    for row in timeless(rows):
        if row.cell.policy == "full":
            extra = row.extra | {"budget_tokens": 0, "budget_bytes": 0}
            row = replace(row, extra=extra, held_bytes=0, context_bytes=0, peak_bytes=0)
        found[row.cell, row.index] = row
    return found
