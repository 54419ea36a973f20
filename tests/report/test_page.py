"""The page, its pictures and tables, and the command that makes them."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from modicum.cli import app
from modicum.errors import InputError
from modicum.evaluation.row import Row
from modicum.report import accuracy
from modicum.report.needles import needles
from modicum.report.page import write_report
from modicum.report.points import HELD, PEAK, points
from modicum.report.results import Results
from modicum.report.sampling import parse_wish, plan_traces
from modicum.report.style import LIGHT, looks
from modicum.report.tables import by_task, overview, size
from modicum.report.trace import Trace
from tests.bounds import exactly
from tests.report.made import PER_TOKEN, row, write
from tests.tiny_model import TINY_MODEL

ROWS = [
    row("full", "full", index=0),
    row("full", "full", index=1),
    row("keydiff", "25%", index=0),
    row("keydiff", "25%", index=1, score=0.0),
    row("keydiff", "25%", index=0, task="text", metric="loss", score=2.0, depth=None),
    row("<i>&amp;", "10%", index=0, system="peer", held=400, score=0.5),
]


class Page(HTMLParser):
    """What stands in a page."""

    void = frozenset({"meta", "source", "img", "input", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_needs_nothing_and_says_what_the_rows_say(tmp_path: Path) -> None:
    trace = Trace(
        model="tiny",
        policy="keydiff",
        budget="25%",
        tokens=100,
        rows=3,
        asked=True,
        kept=(np.arange(200).reshape(2, 100) % 4 == 0,) * 2,
        mass=(np.array([0.5, 0.25, 1.0, 0.75], np.float32), np.full(4, np.nan, np.float32)),
    )
    results = Results(ROWS, ["mind <this>"])
    made = write_report(results, tmp_path / "page.html", traces=[trace], title="A & B")
    text = made.page.read_text(encoding="utf-8")
    page = Page(text)
    links = [v for _, a in page.tags for k, v in a.items() if k in ("src", "href", "srcset") and v]
    assert all(link.startswith(("#", "data:")) for link in links), "nothing is fetched"
    assert "@import" not in text
    assert "url(" not in text
    anchors = {a["id"] for _, a in page.tags if a.get("id")}
    assert {link[1:] for link in links if link.startswith("#")} <= anchors
    words = " ".join(page.words)
    assert "A & B" in words
    assert "mind <this>" in words
    assert "<i>&amp; (peer)" in words
    images = [a for tag, a in page.tags if tag == "img"]
    assert all(a["alt"] for a in images)
    assert len(images) == len(made.pictures) // 2
    # accuracy and loss for two axes, needles of three series, two maps
    assert len(images) == 2 + 2 + 3 + 2
    for path in made.pictures:
        with Image.open(path) as picture:
            assert min(picture.size) > 200
            colours = picture.convert("RGB").getcolors(2**24)
            assert colours is not None
            paper = max(colours)[1]
            assert (sum(paper) < 150) == path.stem.endswith("-dark")
    assert "full cache (100.0%)" in words
    assert made.front == ["keydiff @ 25%", "full cache"]
    assert "100.0 %" in words
    assert "7.39" in words, "the perplexity of 2 nats"


def test_a_page_is_the_same_each_time(tmp_path: Path) -> None:
    rows = [row(index=i, score=s, depth=None) for i, s in enumerate((0.1, 0.7, 0.4))]
    first = write_report(Results(rows), tmp_path / "a.html").page.read_bytes()
    assert write_report(Results(rows), tmp_path / "a.html").page.read_bytes() == first


def test_pages_are_written_where_a_folder_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        write_report(Results(ROWS), tmp_path / "nowhere" / "page.html")
    (tmp_path / "page-files").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot write .*page\.html"):
        write_report(Results([row(depth=None)]), tmp_path / "page.html")


def test_tables_have_the_numbers_in_full() -> None:
    scores = by_task(Results(ROWS), loss=False)
    assert scores is not None
    read = list(csv.DictReader(io.StringIO(scores.csv())))
    kept = next(line for line in read if line["policy"] == "keydiff")
    assert float(kept["score"]) == 0.5
    assert (float(kept["low"]), float(kept["high"])) == pytest.approx((0.0945, 0.9055), abs=1e-4)
    assert kept["interval"] == "wilson"
    assert float(kept["bytes held"]) == 250 * PER_TOKEN
    assert float(kept["tokens/s"]) == 16
    assert float(kept["full bytes"]) == 1024 * PER_TOKEN
    assert next(line for line in read if line["policy"] == "full cache")["nominal bytes"] == ""
    loss = by_task(Results(ROWS), loss=True)
    assert loss is not None
    assert [line["loss (nats)"] for line in csv.DictReader(io.StringIO(loss.csv()))] == ["2.0"]
    assert by_task(Results(ROWS[:1]), loss=True) is None


def test_the_overview_is_in_order_and_marks_the_front() -> None:
    rows = [row("a", held=100, score=0.2), row("b", held=200, score=0.1), row("c", held=300, score=0.9)]
    view = Results(rows).views[0]
    table = overview(view, points(view, ["niah"])[0], HELD, "x")
    assert [(line[0].text, line[-1].text) for line in table.rows] == [
        ("c", "on the front"),
        ("a", "on the front"),
        ("b", ""),
    ]


def test_budgets_sort_by_kind_and_size() -> None:
    order = ["64", "65", "63MiB", "64MiB", "5%", "6%", "50%", "full"]
    table = by_task(Results([row(budget=budget) for budget in reversed(order)]), loss=False)
    assert table is not None
    cells = sorted((line[1] for line in table.rows), key=lambda cell: cell.number or 0)
    assert [cell.value for cell in cells] == order
    assert len({cell.number for cell in cells}) == len(order)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(900, "900 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (150 * 1024, "150 KiB"), (5.25 * 2**20, "5.2 MiB")],
)
def test_sizes_are_for_people(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


def drawn(rows: list[Row], axis: str = HELD) -> Any:
    results = Results(rows)
    view = results.views[0]
    loss = rows[0].metric == "loss"
    found = points(view, view.tasks(loss=loss))[0]
    return accuracy.draw(found, looks(results.views), "title", axis, LIGHT)


def hollow(figure: Any) -> list[float]:
    """Where the hollow markers are."""
    lines = figure.axes[0].lines
    return [x for line in lines if line.get_mfc() == LIGHT.paper for x in line.get_xdata()]


def test_only_a_peer_that_holds_more_than_it_says_is_shown_twice() -> None:
    told = 0.1 * 1000 * 1024 * PER_TOKEN / 1024
    assert hollow(drawn([row("p", "10%", system="peer", held=400)])) == exactly([told])
    assert hollow(drawn([row("p", "10%", system="peer", held=400)], PEAK)) == []
    assert hollow(drawn([row("p", "10%", system="peer", held=101)])) == []
    assert hollow(drawn([row("p", "10%", held=400)])) == []


def test_lines_stand_at_measured_bytes_and_many_go_grey() -> None:
    rows = [row("keydiff", "25%", held=100, score=0.0), row("keydiff", "50%", held=500)]
    figure = drawn([*rows, row("full", "full", held=1000)], PEAK)
    ours = next(line for line in figure.axes[0].lines if line.get_color() == "#0072b2")
    assert list(ours.get_xdata()) == [612 * PER_TOKEN, 1012 * PER_TOKEN]
    assert list(ours.get_ydata()) == [0.0, 1.0]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["keydiff", "full cache", "Pareto front"]
    many = [row(f"p{i}", index=0, score=i / 20, held=100 + i) for i in range(15)]
    labels = [text.get_text() for text in drawn(many).legends[0].get_texts()]
    assert len(labels) == 12 + 2
    assert labels[-1] == "3 more, in the tables"


def test_needles_are_sorted_into_cells() -> None:
    rows = [
        ("a", row(index=0, depth=0.0, score=1.0)),
        ("a", row(index=1, depth=0.19, score=0.0)),
        ("a", row(index=2, depth=1.0, score=1.0)),
        ("a", row(index=3, depth=None)),
        ("a", row(index=4, metric="loss", task="text", score=3.0)),
        ("b", row("b", "50%", index=0, depth=0.5, score=0.25, length=None, context_tokens=1234)),
    ]
    found = needles(rows)
    assert found is not None
    assert found.depths == 5
    assert found.lengths == (1024, 1200)
    assert found.cells == {
        ("a", "25%", 0, 1024): (0.5, 2),
        ("a", "25%", 4, 1024): (1.0, 1),
        ("b", "50%", 2, 1200): (0.25, 1),
    }
    more = [("a", row(index=i, depth=i / 41)) for i in range(41)]
    tens = needles(more)
    assert tens is not None
    assert tens.depths == 10
    assert needles(rows[3:5]) is None


# -- the command --


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["report", *arguments])


def test_the_command_joins_folders(tmp_path: Path) -> None:
    plain = [replace(r, depth=None) for r in ROWS]  # no needle maps, which take their time
    ours = write(tmp_path / "ours", plain[:3])
    peer = write(tmp_path / "peer", plain[5:])
    result = call(str(ours), str(peer), "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["out"] == str(ours / "report.html")
    assert told["rows"] == 4
    assert all(Path(path).exists() for path in [told["out"], *told["pictures"], *told["tables"]])
    assert (ours / "report-files").is_dir()
    elsewhere = tmp_path / "page.html"
    result = call(str(ours), "--out", str(elsewhere), "--title", "Ours")
    assert result.exit_code == 0, result.output
    assert "<h1>Ours</h1>" in elsewhere.read_text(encoding="utf-8")
    assert "best for their bytes" in result.stdout


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    ours = str(write(tmp_path / "ours", ROWS[:3]))
    for arguments, said in (
        ([str(tmp_path / "nowhere")], "nowhere"),
        ([ours, "--trace", "keydiff"], "policy@budget"),
        ([ours, "--trace", "keydif@25%"], "keydiff"),
        ([ours, "--trace", "keydiff@25%", "--trace-task", "vt"], "the task vt has no rows"),
        ([ours, "--trace-task", "niah"], "--trace POLICY@BUDGET too"),
    ):
        result = call(*arguments)
        assert result.exit_code == 2, result.output
        assert re.search(re.escape(said), result.stderr), result.stderr
    assert not (tmp_path / "ours" / "report.html").exists()


class Fixed:
    """A task of one text."""

    name, metric = "niah", "string_match_all"

    def sample(self, index: int, length: int | None, tokenizer: Any, seed: int = 0) -> Any:
        from modicum.tasks.sample import Sample

        text = "Once upon a time there was a little dog. " * 12
        return Sample(self.name, index, text, " The dog was", ("happy",), self.metric, 4)

    def __len__(self) -> int:
        return 9


def test_traces_are_of_the_longest_sample_with_the_rows_settings() -> None:
    import modicum

    rows = [
        row(index=2, length=512),
        row(index=3, length=1024, chunk=64, recent=16),
        row("snapkv", index=3, length=1024, chunk=64, recent=16),
    ]
    wishes = [parse_wish(text) for text in ("keydiff@25%", "caote+snapkv @ 48", "full@full")]
    assert wishes[1] == ("caote(snapkv)", "48") or wishes[1] == ("caote+snapkv", "48")
    plans = plan_traces(Results(rows), wishes, known=Fixed())
    assert {(p.index, p.cell.length, p.cell.chunk, p.cell.recent) for p in plans} == {(3, 1024, 64, 16)}
    model, tokenizer = modicum.load(TINY_MODEL, dtype="float32")
    made = [plan.run(model, tokenizer) for plan in plans]
    assert [t.key for t in made] == [("tiny", *wish, "niah", 3) for wish in wishes]
    counts = [int(t.kept[0][0].sum()) for t in made]
    assert counts == [made[0].tokens // 4, 48, made[0].tokens]
    assert 0 < made[0].mean_mass < 1
    assert made[2].mean_mass == exactly(1.0)


def test_traces_of_several_models_or_of_peers_alone_are_refused() -> None:
    with pytest.raises(InputError, match="of one model"):
        plan_traces(Results([row(), row(model="other")]), [("keydiff", "25%")])
    with pytest.raises(InputError, match="modicum itself made"):
        plan_traces(Results([row(system="peer")]), [("keydiff", "25%")])
