"""Rows joined, named and averaged; the Pareto front against its definition."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest

from modicum.errors import InputError
from modicum.report.points import HELD, PEAK, Point, pareto, points
from modicum.report.results import Results, budget_order, nominal_bytes
from modicum.report.style import FULL_LOOK, LABELLED, looks
from tests.bounds import exactly
from tests.report.made import PER_TOKEN, row, write


def test_folders_are_joined_and_what_both_have_counts_once(tmp_path: Path) -> None:
    first = write(tmp_path / "a", [row(index=0), row(index=1, score=0.0)])
    second = write(tmp_path / "b", [row(index=1, score=1.0), row("snapkv", index=0)])
    results = Results.read([first, second])
    assert [(r.cell.policy, r.index, r.score) for r in results.rows] == [
        ("keydiff", 0, 1.0),
        ("keydiff", 1, 0.0),
        ("snapkv", 0, 1.0),
    ]
    assert len(results.warnings) == 1
    assert "1 samples" in results.warnings[0]
    assert str(second) in results.warnings[0]
    # The same folder twice is no news.
    assert Results.read([first, first]).warnings == []


def test_a_torn_last_line_is_warned_of_and_left_out(tmp_path: Path) -> None:
    folder = write(tmp_path, [row(index=0), row(index=1)])
    file = folder / "rows.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    results = Results.read([folder])
    assert [r.index for r in results.rows] == [0]
    assert "cut short" in results.warnings[0]


def test_what_cannot_be_reported_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        Results.read([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="nothing to report"):
        Results.read([])
    empty = write(tmp_path / "empty", [])
    with pytest.raises(InputError, match="has no rows yet"):
        Results.read([empty])
    broken = write(tmp_path / "broken", [row(index=0), row(index=1)])
    file = broken / "rows.jsonl"
    file.write_text(file.read_text().replace('"index": 0', '"index" 0'))
    with pytest.raises(InputError, match="line 1 of"):
        Results.read([broken])
    mixed = write(tmp_path / "mixed", [row(), row("snapkv", metric="f1")])
    with pytest.raises(InputError, match=r"niah is judged by string_match_all .* and by f1"):
        Results.read([mixed])
    with pytest.raises(InputError, match="finite number"):
        Results([row(score=math.nan)])


def test_scores_that_are_no_numbers_are_left_out_with_a_warning() -> None:
    results = Results([row(index=0), row(index=1, score=math.inf)])
    assert [r.index for r in results.rows] == [0]
    assert "sample 1 of niah under keydiff" in results.warnings[0]


def test_series_are_named_by_what_tells_them_apart() -> None:
    results = Results(
        [
            row("full", "full"),
            row("keydiff", chunk=512),
            row("keydiff", chunk=None),
            row("snapkv", system="kvpress", chunk=None, n_sink=None, recent=None),
        ]
    )
    assert [s.series for view in results.views for s in view.strata] == [
        "full cache, chunk 512",
        "keydiff, chunk 512",
        "keydiff, one shot",
        "snapkv (kvpress)",
    ]
    # Nothing differs: nothing is said.
    alone = Results([row("full", "full"), row("keydiff")])
    assert [s.series for s in alone.views[0].strata] == ["full cache", "keydiff"]


def test_models_and_question_modes_are_not_compared() -> None:
    rows = [row(question="seen"), row(question="hidden"), row(model="other"), row(dtype="bfloat16")]
    assert [(v.model, v.dtype, v.question) for v in Results(rows).views] == [
        ("tiny", "float32", "hidden"),
        ("tiny", "float32", "seen"),
        ("other", "float32", "hidden"),
        ("tiny", "bfloat16", "hidden"),
    ]


def test_a_mean_counts_each_task_alike_and_needs_all_of_them() -> None:
    rows = [
        *(row(index=i, task="a", score=1.0, held=100) for i in range(9)),
        row(task="b", score=0.0, held=300),
        row("snapkv", task="a"),
    ]
    view = Results(rows).views[0]
    found, left_out = points(view, ["a", "b"])
    assert [p.name for p in found] == ["keydiff @ 25%"]
    assert left_out == ["snapkv @ 25%"]
    assert found[0].score == 0.5
    assert found[0].held == 200 * PER_TOKEN
    assert found[0].peak == (200 + 512) * PER_TOKEN
    assert found[0].count == 10
    # Squares of the distances to the strata's own limits add up; Wilson of 9 of 9 and of 0 of 1.
    z = 1.959963984540054
    below, above = 1 - 9 / (9 + z * z), z * z / (1 + z * z)
    assert found[0].low == exactly(0.5 - below / 2)
    assert found[0].high == exactly(0.5 + above / 2)
    alone, none = points(view, ["a"])
    assert sorted(p.series for p in alone) == ["keydiff", "snapkv"]
    assert none == []


def test_nominal_bytes_are_what_the_budget_says() -> None:
    seen = 1000 + 20 + 4
    assert nominal_bytes(row(budget="25%")) == exactly(0.25 * 1000 * 1024 * PER_TOKEN / seen)
    assert nominal_bytes(row(budget="100")) == exactly(100 * 1024 * PER_TOKEN / seen)
    assert nominal_bytes(row(budget="2KiB")) == 2048
    assert nominal_bytes(row("full", "full")) is None
    assert nominal_bytes(row(budget="4 bits")) is None
    said = row(budget="4 bits", extra={"question_tokens": 20, "nominal_share": 0.5})
    assert nominal_bytes(said) == exactly(0.5 * 1000 * 1024 * PER_TOKEN / seen)


def test_budgets_are_in_order_of_kind_and_size() -> None:
    order = ["64", "256", "512KiB", "1MiB", "5%", "25%", "full", "4 bits"]
    shuffled = random.Random(3).sample(order, len(order))
    assert sorted(shuffled, key=budget_order) == order


@pytest.mark.parametrize("loss", [False, True])
def test_the_front_is_what_no_other_dominates(loss: bool) -> None:
    rng = random.Random(5)
    for _ in range(200):
        found = [
            Point("s", str(i), False, False, loss, 1, rng.randrange(5), 0, 0, rng.randrange(6), 0, 9, None)
            for i in range(rng.randrange(1, 9))
        ]

        def beaten(p: Point, q: Point, loss: bool = loss) -> bool:
            better = q.score <= p.score if loss else q.score >= p.score
            return q.held <= p.held and better and (q.held, q.score) != (p.held, p.score)

        wanted = {(p.held, p.score) for p in found if not any(beaten(p, q) for q in found)}
        front = pareto(found, HELD)
        assert {(p.held, p.score) for p in front} == wanted
        assert len(front) == len(wanted)
        assert [p.held for p in front] == sorted(p.held for p in front)


def test_the_front_depends_on_the_axis() -> None:
    cheap = row("a", held=100, score=0.0, peak_bytes=900 * PER_TOKEN)
    dear = row("b", held=200, score=1.0, peak_bytes=300 * PER_TOKEN)
    found, _ = points(Results([cheap, dear]).views[0], ["niah"])
    assert [p.series for p in pareto(found, HELD)] == ["a", "b"]
    assert [p.series for p in pareto(found, PEAK)] == ["b"]


def test_looks_are_distinct_and_the_best_are_labelled() -> None:
    names = [f"p{i:02}" for i in range(LABELLED + 3)]
    rows = [row(name, index=i, score=i / 20) for i, name in enumerate(names)]
    made = looks(Results([row("full", "full"), *rows]).views)
    assert made["full cache"] is FULL_LOOK
    labelled = [name for name in names if made[name].labelled]
    assert labelled == names[3:]
    drawn = [(made[n].colour, made[n].marker, made[n].dash) for n in labelled]
    assert len(set(drawn)) == LABELLED
    for a, b in itertools.combinations(drawn, 2):
        assert a[1] != b[1], "told apart without colour"
