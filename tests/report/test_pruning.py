"""The page of pruned models, its pictures and tables, and the command that makes it."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

from modicum.cli import app
from modicum.errors import InputError
from modicum.report.losses import Line, draw_errors, draw_perplexity, kinds
from modicum.report.pruned import Pruned, holds_pruned, labels, read_pruned
from modicum.report.pruning import write_pruning
from modicum.report.style import LIGHT, byte_axis, dress
from modicum.weights.dsnot import DSnoT
from modicum.weights.entry import prune
from modicum.weights.swap import Swap
from tests.bounds import exactly
from tests.report.made import row, write
from tests.report.test_page import Page
from tests.weights import models

SWAP = repr(Swap())


def layer(name: str = "self_attn.q_proj", block: int = 0, **more: Any) -> dict[str, Any]:
    """A row of the report's table."""
    made = {
        "name": f"model.layers.{block}.{name}" + ("" if name.endswith("]") else ".weight"),
        "block": block,
        "rows": 10,
        "width": 20,
        "kept": 80,
        "sparsity": 0.6,
        "tokens": 100,
        "error_before": 0.25,
        "error_refined": 0.125,
        "error_after": 0.0625,
        "changed": 7,
        "capped": 0,
        "seconds": 0.5,
    }
    return made | more


def told(**more: Any) -> dict[str, Any]:
    """A report as `modicum prune --out` writes it."""
    made = {
        "perplexity_before": 20.5,
        "perplexity_after": 31.25,
        "dense_bytes": 4096,
        "packed_bytes": 2048,
        "method": "wanda",
        "refine": SWAP,
        "update": "none",
        "pattern": "0.6",
        "layers": "uniform",
        "sparsity": 0.6,
        "shares": [0.6, 0.6],
        "table": [layer(name, block) for block in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")],
        "tokens": 1234,
        "seconds": 12.0,
        "peak_bytes": 3 * 2**20,
    }
    return made | more


def put(folder: Path, data: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return folder


def read(folder: Path, *many: dict[str, Any]) -> list[Pruned]:
    return read_pruned([put(folder / str(number), data) for number, data in enumerate(many)])


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["report", *arguments])


def test_the_page_needs_nothing_and_says_what_the_report_says(tmp_path: Path) -> None:
    data = told(table=[layer(block=0), layer(block=1, kept=40, error_after=0.5)])
    made = write_pruning(read(tmp_path, data), tmp_path / "page.html", title="A & B")
    text = made.page.read_text(encoding="utf-8")
    page = Page(text)
    links = [v for _, a in page.tags for k, v in a.items() if k in ("src", "href", "srcset") and v]
    assert all(link.startswith(("#", "data:")) for link in links), "nothing is fetched"
    anchors = {a["id"] for _, a in page.tags if a.get("id")}
    assert {link[1:] for link in links if link.startswith("#")} <= anchors
    words = " ".join(page.words)
    for part in ("A & B", "wanda + swap @ 60%", "20.50", "31.25", "4 KiB", "2 KiB", "3 MiB", "1,234 tokens"):
        assert part in words, part
    assert "70.0 %" in words, "removed in all"
    assert "80.0 %" in words, "of block 1"
    assert "1.self_attn.q_proj (0.5000)" in words, "the worst layer"
    images = [a for tag, a in page.tags if tag == "img"]
    assert len(images) == len(made.pictures) // 2 == 1, "no comparison, and equal shares are not drawn"
    assert "0.2500 as chosen, 0.1250 refined" in str(images[0]["alt"])
    for path in made.pictures:
        with Image.open(path) as picture:
            colours = picture.convert("RGB").getcolors(2**24)
            assert colours is not None
            assert (sum(max(colours)[1]) < 150) == path.stem.endswith("-dark")


def test_tables_have_the_numbers_in_full(tmp_path: Path) -> None:
    expert = layer("mlp.experts.up_proj[2]", 1, error_before=None, error_refined=None, error_after=None)
    write_pruning(read(tmp_path, told(table=[layer(), expert])), tmp_path / "page.html")
    files = tmp_path / "page-files"
    found = list(csv.DictReader(io.StringIO((files / "layers.csv").read_text(encoding="utf-8"))))
    assert [line["weight"] for line in found] == [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.experts.up_proj[2]",
    ]
    assert [line["kind"] for line in found] == ["self_attn.q_proj", "mlp.experts.up_proj"]
    first = found[0]
    assert (first["error"], first["refined"], first["updated"]) == ("0.25", "0.125", "0.0625")
    assert (first["size"], first["kept"], first["moved"], first["block"]) == ("10x20", "80", "7", "0")
    assert float(first["removed"]) == 0.6
    assert found[1]["error"] == ""
    (summary,) = csv.DictReader(io.StringIO((files / "summary.csv").read_text(encoding="utf-8")))
    assert (summary["perplexity before"], summary["after"]) == ("20.5", "31.25")
    assert (summary["dense"], summary["packed"], summary["peak memory"]) == ("4096", "2048", str(3 * 2**20))
    assert (summary["refine"], summary["refiner"]) == ("swap", SWAP)
    assert float(summary["mean error"]) == 0.0625, "over the layers that have one"


def test_runs_are_compared_on_one_page(tmp_path: Path) -> None:
    bare = told(refine=None, method="magnitude", perplexity_after=80.0, packed_bytes=2000)
    owl = told(layers="owl", shares=[0.5, 0.7], table=[layer(kept=100), layer(block=1, kept=60)])
    bare["table"] = [layer(), layer(block=1)]
    made = write_pruning(read(tmp_path, bare, owl), tmp_path / "page.html")
    names = {path.stem for path in made.pictures if not path.stem.endswith("-dark")}
    assert names == {"perplexity", "errors", "errors-2-wanda-swap-owl", "removed"}
    page = Page(made.page.read_text(encoding="utf-8"))
    alts = " ".join(str(a["alt"]) for tag, a in page.tags if tag == "img")
    assert "magnitude 80.00 at 2 KiB; wanda + swap, owl 31.25 at 2 KiB" in alts
    assert "wanda + swap, owl: 50.0% of block 0 to 70.0% of block 1" in alts
    lines = (tmp_path / "page-files" / "layers.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 4
    assert not made.warnings


def test_what_makes_runs_unlike_is_warned_of(tmp_path: Path) -> None:
    runs = read(tmp_path, told(), told(perplexity_before=10.0, tokens=5), told(perplexity_after=math.inf))
    made = write_pruning(runs, tmp_path / "page.html")
    assert [warning.split(",")[0] for warning in made.warnings] == [
        "the perplexity of wanda + swap (2) is no finite number",
        "the perplexities before pruning differ",
        "not all runs calibrated on as many tokens: errors are of unlike texts",
    ]
    assert "inf" in made.page.read_text(encoding="utf-8")


def test_what_a_run_is_of_is_told_where_it_is_known(tmp_path: Path) -> None:
    known = told(model="big", dtype="bfloat16", calibration="book.txt", seed=3, held_back_tokens=512)
    known["budget"] = "2KiB"
    made = write_pruning(read(tmp_path, known, told()), tmp_path / "page.html")
    assert not made.warnings, "what is not known is not unlike"
    words = Page(made.page.read_text(encoding="utf-8")).words
    for part in (
        "big, bfloat16",
        "1,234 tokens of book.txt (seed 3), 1,234 tokens",
        "512 tokens",
        "for 2KiB",
    ):
        assert part in words, part
    table = (tmp_path / "page-files" / "summary.csv").read_text(encoding="utf-8")
    first, second = csv.DictReader(io.StringIO(table))
    assert (first["source"], first["calibration"], first["seed"]) == ("big", "book.txt", "3")
    assert (second["source"], second["seed"], second["held back"]) == ("", "", "")
    made = write_pruning(
        read(tmp_path, known, known | {"seed": 4, "calibration": "a"}), tmp_path / "page.html"
    )
    assert made.warnings == [
        "not all runs calibrated on the same source, the same seed: errors are of unlike texts"
    ]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(3.3, 6.1, [4, 5, 6]), (5.7, 12, [6, 8, 10, 12]), (1, 9, [1, 2, 4, 8]), (0.9, 400, [1, 4, 16, 64, 256])],
)
def test_bytes_have_round_ticks(low: float, high: float, ticks: list[float]) -> None:
    axis = Figure().add_subplot()
    byte_axis(axis, [low * 2**30, high * 2**30], "bytes")
    left, right = axis.get_xlim()
    shown = [tick / 2**30 for tick in axis.get_xticks() if left <= tick <= right]
    assert shown == exactly(ticks)


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    assert labels(read(tmp_path / "a", told(update="lsq", pattern="2:4"))) == ["wanda + swap + lsq @ 2:4"]
    plain, blocks = told(refine=None), told(refine=None, pattern="16x4 at 0.35")
    assert labels(read(tmp_path / "b", plain, blocks)) == ["wanda @ 60%", "wanda @ 16x4 at 35%"]
    assert labels(read(tmp_path / "c", plain, told())) == ["wanda", "wanda + swap"]
    assert labels(read(tmp_path / "d", plain, plain, told())) == ["wanda (0)", "wanda (1)", "wanda + swap"]
    twins = [put(tmp_path / side / "same", plain) for side in ("x", "y")]
    names = labels(read_pruned([*twins, twins[0]]))
    assert names == [f"wanda (same) ({folder / 'report.json'})" for folder in twins]


@pytest.mark.parametrize(
    ("how", "name"),
    [
        (DSnoT(), "dsnot"),
        (DSnoT.guard(), "dsnot-guarded"),
        (DSnoT.paper(), "dsnot-paper"),
        (Swap(shortlist=8), "swap"),
        (None, "none"),
    ],
)
def test_refiners_have_the_command_lines_names(how: Any, name: str, tmp_path: Path) -> None:
    (run,) = read(tmp_path, told(refine=None if how is None else repr(how)))
    assert run.refine == name


@pytest.mark.parametrize(
    ("name", "first", "of"),
    [
        ("llama", "self_attn.q_proj", 7),
        ("mixtral", "self_attn.q_proj", 6),
        ("gpt-neox", "attention.query_key_value", 4),
    ],
)
def test_what_prune_reports_is_read(name: str, first: str, of: int, tmp_path: Path) -> None:
    found = prune(models.build(name), models.ids(), sparsity=0.5, refine="swap", update="lsq")
    (run,) = read(tmp_path, found.to_dict())
    assert kinds(run.weights)[0] == first
    assert len(kinds(run.weights)) == of
    assert run.removed == exactly(found.achieved)
    assert run.error == exactly(found.error)
    assert (run.name, run.before, run.packed_bytes) == ("wanda + swap + lsq", None, None)
    assert [(w.chosen, w.updated) for w in run.weights] == [
        (x.error_before, x.error_after) for x in found.table
    ]


def test_pictures_have_a_panel_for_each_kind_and_a_band_for_experts(tmp_path: Path) -> None:
    experts = [
        layer(f"mlp.experts.up_proj[{i}]", b, error_after=0.1 * (i + 1)) for b in (0, 1) for i in (0, 1, 2)
    ]
    none = layer("mlp.router", 1, error_after=0.0)
    (run,) = read(tmp_path, told(table=[layer(), layer(block=1, error_after=0.03), none, *experts]))
    line = Line("x", dress({"x": 0.0})["x"], run.weights, lambda w: w.updated)
    figure = draw_errors([line], "title", LIGHT)
    panels = [panel for panel in figure.axes if panel.get_visible()]
    titles = [panel.get_title(loc="left") for panel in panels]
    assert titles == ["self_attn.q_proj", "mlp.router", "mlp.experts.up_proj"]
    shown = [list(panel.lines[0].get_ydata()) for panel in panels]
    assert shown[0] == [0.0625, 0.03]
    assert shown[1] == [], "0 has no place on a logarithmic axis"
    assert shown[2] == exactly([0.2, 0.2])
    assert [len(panel.collections) for panel in panels] == [0, 0, 1]


def test_one_methods_sizes_are_joined_and_stand_at_their_bytes(tmp_path: Path) -> None:
    runs = read(tmp_path, told(), told(pattern="2:4", packed_bytes=2500, perplexity_after=25.0))
    named = list(zip(labels(runs), runs, strict=True))
    figure = draw_perplexity(named, dress({name: 0.0 for name, _ in named}), LIGHT)
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines]
    assert lines[0] == ([2048, 2500], [31.25, 25.0])
    assert lines[1:3] == [([2048], [31.25]), ([2500], [25.0])]
    assert ([4096], [20.5]) in lines, "the model as it was"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("{", "Expecting property name"),
        ("[1]", "no JSON object"),
        ({"a": 1}, "no table of layers"),
        (told(table=[]), "no table of layers"),
        (told(table=[layer(), 5]), "row 2 of its table is no JSON object"),
        (told(table=[layer(kept=201)]), "row 1 of its table: kept is 201 of 10 × 20"),
        (told(table=[layer(kept="many")]), "row 1 of its table: kept is 'many', not a number"),
        (told(table=[layer(rows=1.5)]), "rows is 1.5, not a whole number"),
        (told(table=[{k: v for k, v in layer().items() if k != "block"}]), "it lacks block"),
        (told(table=[layer(block=2)]), "shares of 2 blocks and a layer of block 2"),
        (told(shares=[0.5, 7]), "share is 7, not from 0 to 1"),
        (told(shares=None), "no shares of blocks"),
        (told(packed_bytes=-1), "packed_bytes is -1"),
        (told(method=3), "method is 3, not text"),
        (told(model=3), "model is 3, not text"),
        (told(seed=0.5), "seed is 0.5, not a whole number"),
    ],
)
def test_damaged_reports_are_refused_by_name(data: Any, said: str, tmp_path: Path) -> None:
    folder = put(tmp_path / "x", data)
    with pytest.raises(InputError, match="prune again") as caught:
        read_pruned([folder])
    assert said in str(caught.value)
    assert str(folder / "report.json") in str(caught.value)


def test_reports_of_other_models_are_not_compared(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not of the same layers"):
        read(tmp_path, told(), told(table=[layer(width=40)]))


def test_evaluations_and_pruned_models_make_two_pages(tmp_path: Path) -> None:
    pruned = put(tmp_path / "pruned", told())
    rows = write(tmp_path / "rows", [row(depth=None)])
    both = write(put(tmp_path / "both", told()), [row()])
    assert holds_pruned([pruned, pruned / "report.json"])
    assert not holds_pruned([rows, rows / "rows.jsonl"])
    assert not holds_pruned([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="say which by its file"):
        holds_pruned([both])
    assert holds_pruned([both / "report.json"])


# -- the command --


def test_the_command_makes_the_page(tmp_path: Path) -> None:
    one, two = put(tmp_path / "one", told()), put(tmp_path / "two", told(refine=None, perplexity_after=50.0))
    result = call(str(one), str(two), "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["out"] == str(one / "report.html")
    assert all(Path(path).exists() for path in [said["out"], *said["pictures"], *said["tables"]])
    assert [m["model"] for m in said["models"]] == ["wanda + swap", "wanda"]
    assert [m["perplexity_after"] for m in said["models"]] == [31.25, 50.0]
    assert "<h1>What pruning kept</h1>" in Path(said["out"]).read_text(encoding="utf-8")
    elsewhere = tmp_path / "page.html"
    result = call(str(two / "report.json"), "--out", str(elsewhere), "--title", "Two")
    assert result.exit_code == 0, result.output
    assert "<h1>Two</h1>" in elsewhere.read_text(encoding="utf-8")
    assert "1 pruned model, 1 picture, light and dark" in result.stdout
    assert "perplexity after pruning: 50.00 at 2 KiB, wanda @ 60%" in result.stdout


def test_what_modicum_prune_wrote_is_read(tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    how = ["--sequences", "8", "--length", "32", "--refine", "none", "--budget", "4MiB", "--seed", "2"]
    result = CliRunner().invoke(app, ["prune", *how, "--out", str(out)])
    assert result.exit_code == 0, result.output
    (run,) = read_pruned([out])
    assert (run.method, run.refine, run.seed, run.budget) == ("wanda", "none", 2, "4MiB")
    assert (run.tokens, run.held_back) == (8 * 32, 32)
    assert (run.model, run.dtype, run.calibration) == ("reference", "float32", "the sample text")
    assert run.perplexities is not None
    assert run.packed_bytes is not None
    assert run.packed_bytes <= 4 * 2**20 < (run.dense_bytes or 0)
    result = call(str(out))
    assert result.exit_code == 0, result.output
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    for part in ("reference, float32", "256 tokens of the sample text (seed 2)", "for 4MiB"):
        assert part in page.words, part


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    pruned = str(put(tmp_path / "pruned", told()))
    rows = str(write(tmp_path / "rows", [row()]))
    for arguments, said in (
        ([pruned, rows], "report them apart"),
        ([rows, pruned], "report them apart"),
        ([pruned, "--trace", "keydiff@25%"], "--trace maps what a cache keeps"),
        ([pruned, "--trace-task", "niah"], "--trace maps what a cache keeps"),
        ([str(tmp_path / "no.json")], "modicum prune --out"),
        ([pruned, str(tmp_path / "nowhere")], "cannot read"),
        ([rows, str(tmp_path / "nowhere")], "cannot read"),
        ([str(put(tmp_path / "bad", "{"))], "damaged"),
    ):
        result = call(*arguments)
        assert result.exit_code == 2, result.output
        assert said in result.stderr
    assert not (tmp_path / "pruned" / "report.html").exists()
