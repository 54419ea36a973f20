"""Page: one HTML page that needs nothing else, its PNGs and CSVs beside it; and that of rows and traces."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.resources import files
from pathlib import Path

from modicum.errors import InputError
from modicum.report import accuracy, maps, needles
from modicum.report.points import HELD, PEAK, Point, pareto, points
from modicum.report.results import Results, View
from modicum.report.style import Look, Picture, looks, paint
from modicum.report.tables import Table, by_task, overview
from modicum.report.trace import Trace

TITLE = "Accuracy against bytes"


@dataclass(frozen=True)
class Section:
    """A part of the page: text, pictures, a table."""

    anchor: str
    title: str
    text: str
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    switch: bool = False
    """Whether the pictures come for two axes, of which one is shown."""


@dataclass(frozen=True)
class Head:
    """What stands above the sections, and below."""

    title: str
    count: str
    """What the page is of, such as "12 rows"."""
    command: str
    """That wrote it."""
    lead: str
    foot: str
    facts: Mapping[str, Sequence[str]]
    """Those without values are left out."""
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Report:
    """What was written."""

    page: Path
    pictures: list[Path]
    tables: list[Path]
    warnings: list[str]
    front: list[str] = field(default_factory=list)
    """The Pareto front of the first view's mean over tasks, by rising bytes."""


def write_report(
    results: Results,
    out: str | Path,
    *,
    traces: Sequence[Trace] = (),
    title: str = TITLE,
    progress: Callable[[str], object] | None = None,
) -> Report:
    """Write the page to `out`, and its pictures (light and dark) and tables into `<out's stem>-files`.

    progress: told the name of each section before it is drawn.

    Raises:
        InputError: the folder does not exist or cannot be written.
    """
    head = Head(
        title,
        f"{len(results.rows):,} rows",
        "modicum eval",
        "One row is one sample under one policy and budget.",
        "Bytes are measured: keys, values, positions and what a policy keeps.",
        results.facts(),
        results.warnings,
    )
    report = write_page(out, head, _sections(results, traces, progress or (lambda _: None)))
    view = results.views[0]
    found = points(view, view.tasks(loss=not view.tasks(loss=False)))[0]
    front = [point.name for point in pareto(found, HELD)]
    return replace(report, front=front)


def write_page(out: str | Path, head: Head, sections: Iterable[Section]) -> Report:
    """Write a page to `out`, and its pictures (light and dark) and tables into `<out's stem>-files`.

    Raises:
        InputError: the folder does not exist (found before a section is drawn) or cannot be written.
    """
    out = Path(out)
    if not out.parent.is_dir():
        raise InputError(f"cannot write {out}: there is no folder {out.parent}")
    sections = list(sections)
    html = _render(head, sections)
    beside = out.with_name(out.stem + "-files")
    pictures, tables = [], []
    try:
        beside.mkdir(exist_ok=True)
        for section in sections:
            for picture in section.pictures:
                for data, suffix in ((picture.light, ""), (picture.dark, "-dark")):
                    path = beside / f"{picture.name}{suffix}.png"
                    path.write_bytes(data)
                    pictures.append(path)
            for table in section.tables:
                tables.append(beside / f"{table.name}.csv")
                tables[-1].write_text(table.csv(), encoding="utf-8")
        out.write_text(html, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}; give another --out") from error
    return Report(out, pictures, tables, list(head.warnings))


def _sections(results: Results, traces: Sequence[Trace], tell: Callable[[str], object]) -> Iterator[Section]:
    style = looks(results.views)
    for view in results.views:
        for loss in (False, True):
            tasks = view.tasks(loss=loss)
            if tasks:
                section = _comparison(results, view, tasks, style, loss)
                tell(section.title)
                yield section
    for view in results.views:
        grids = _needles(results, view)
        if grids is not None:
            tell(grids.title)
            yield grids
    if traces:
        tell("Kept positions")
        yield _traces(traces)
    tables = [t for t in (by_task(results, loss=False), by_task(results, loss=True)) if t]
    text = (
        "95 % intervals stand behind the means: Wilson's where every score is 0 or 1, else a bootstrap of "
        "2,000 resamples. Bytes held are those after the context, with their share of a full cache; peak "
        "bytes include the chunk in hand. A click on a heading sorts."
    )
    yield Section("tables", "Tables", text, tables=tuple(tables))


def _comparison(
    results: Results, view: View, tasks: list[str], style: Mapping[str, Look], loss: bool
) -> Section:
    what = "Loss" if loss else "Accuracy"
    lengths = sorted({s.length or 0 for s in view.strata if s.task in tasks})
    name = f"{slug(view.model)}-{view.dtype}-{view.question}"
    kind = "loss" if loss else "accuracy"
    found, left_out = points(view, tasks)
    panels: list[tuple[str, str, list[Point]]] = []
    if len(tasks) > 1 and found:
        panels.append(("mean", f"Mean over {len(tasks)} tasks", found))
    for task in tasks:
        panels.append((slug(task), task, points(view, [task])[0]))
    if len(lengths) > 1:
        for length in lengths:
            shown = f"{length:,} tokens" if length else "as long as the data"
            at = points(view, tasks, length or None)[0]
            mean = "Mean at " if len(tasks) > 1 else f"{tasks[0]} at "
            panels.append((f"at-{length}", mean + shown, at))
    pictures = []
    for part, title, at in panels:
        for axis in (HELD, PEAK):
            if at:
                alt = f"{what} against {accuracy.AXES[axis]}, {title}, question {view.question}: " + _told(
                    at, axis
                )
                draw = partial(accuracy.draw, at, style, title, axis)
                pictures.append(paint(f"{kind}-{name}-{part}-{axis}", alt, draw, axis))
    notes = []
    if left_out:
        notes.append(
            "Left out of the mean, as some task or length has not been run for it: "
            + ", ".join(left_out)
            + "."
        )
    counts = {s.summary.count for s in view.strata if s.task in tasks}
    if len(counts) > 1:
        notes.append(
            f"Not all means are over as many samples: {min(counts):,} to {max(counts):,}. The tables say how "
            "many."
        )
    if found:
        notes.append(
            "Pareto front of bytes held, from few to many: "
            + "; ".join(f"{p.name} ({_value(p)})" for p in pareto(found, HELD))
            + "."
        )
    question = {
        "hidden": "The context was compressed before the question was known.",
        "seen": "Context and question were compressed together.",
    }.get(view.question, view.question)
    text = f"{view.model}, {view.dtype}. " + ("" if loss else question + " ")
    text += "Bars are 95 % intervals; the yellow band is the best that so many bytes bought."
    models = {(v.model, v.dtype) for v in results.views}
    heading = f"{what} against bytes"
    if not loss:
        heading += f", question {view.question}"
    if len(models) > 1:
        heading += f": {view.model}" + (f" {view.dtype}" if len({m for m, _ in models}) < len(models) else "")
    tables = (overview(view, found, HELD, f"{kind}-{name}-mean"),) if found else ()
    return Section(f"{kind}-{name}", heading, text, tuple(pictures), tables, tuple(notes), switch=True)


def _value(point: Point) -> str:
    return f"{point.score:.3f} nats" if point.loss else f"{point.score:.1%}"


def _told(found: Sequence[Point], axis: str) -> str:
    """A picture in words: its front."""
    from modicum.report.tables import size

    return "; ".join(f"{p.name} {_value(p)} at {size(p.at(axis))}" for p in pareto(found, axis))


def _needles(results: Results, view: View) -> Section | None:
    rows = [
        (results.series(vars(row.cell)), row)
        for row in results.rows
        if (row.cell.model, row.cell.dtype, row.cell.question) == (view.model, view.dtype, view.question)
    ]
    found = needles.needles(rows)
    if found is None:
        return None
    name = f"needles-{slug(view.model)}-{view.dtype}-{view.question}"
    tasks = dict.fromkeys(r.cell.task for _, r in rows if r.depth is not None and r.metric != "loss")
    # The full cache first: it is what the others are held against.
    ordered = sorted(found.names, key=lambda n: not n.startswith("full cache"))
    pictures = [
        paint(
            f"{name}-{slug(series)}",
            f"Score by depth and length: {series}",
            partial(needles.draw, found, series),
        )
        for series in ordered
    ]
    text = (
        f"{view.model}, {view.dtype}. Score by where in the context the (first) needle stands, in percent, "
        f"over {', '.join(tasks)}. Each panel is a budget; hatched cells have no samples."
    )
    models = {(v.model, v.dtype) for v in results.views}
    heading = f"Needles, question {view.question}" + (f": {view.model}" if len(models) > 1 else "")
    return Section(name, heading, text, tuple(pictures))


def _traces(traces: Sequence[Trace]) -> Section:
    pictures = []
    for trace in traces:
        name = trace.policy if trace.budget == "full" else f"{trace.policy} @ {trace.budget}"
        part = slug(f"{trace.model}-{trace.policy}-{trace.budget}-{trace.task}-{trace.sample}")
        alt = f"Kept positions per layer and KV head: {name} kept {trace.kept_share:.1%}"
        pictures.append(paint(f"kept-{part}", alt, partial(maps.draw_kept, trace, name)))
        alt = f"Attention mass retained per layer and query head: {name} {trace.mean_mass:.1%} on average"
        pictures.append(paint(f"mass-{part}", alt, partial(maps.draw_mass, trace, name)))
    first = traces[0]
    whose = "the question's tokens" if first.asked else "the context's last tokens"
    source = f" (sample {first.sample} of {first.task})" if first.task else ""
    text = (
        f"One context of {first.tokens:,} tokens{source}, read under each policy. The wide maps show what "
        f"each layer and KV head kept. The others show, of the attention that {whose} give to the context "
        "with the full cache, the share that lies on kept positions."
    )
    return Section("kept", "Kept positions and retained attention", text, tuple(pictures))


def _render(head: Head, sections: Sequence[Section]) -> str:
    from jinja2 import Environment

    def data(content: bytes | str, kind: str) -> str:
        raw = content.encode() if isinstance(content, str) else content
        return f"data:{kind};base64,{base64.b64encode(raw).decode()}"

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["png"] = lambda content: data(content, "image/png")
    environment.filters["csv"] = lambda table: data(table.csv(), "text/csv;charset=utf-8")
    template = environment.from_string(files("modicum.report").joinpath("page.html").read_text("utf-8"))
    return template.render(head=head, sections=sections)


def slug(text: str) -> str:
    """A name for files and anchors."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "x"
