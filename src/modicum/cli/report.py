"""`modicum report`: a page, pictures and tables of what `modicum eval` measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modicum.cli.console import complain, load, print_json
from modicum.cli.options import DeviceOption, JsonOption
from modicum.errors import InputError

if TYPE_CHECKING:
    from modicum.report.results import Results
    from modicum.report.trace import Trace


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(help="What `modicum eval --out` wrote; several are joined.", metavar="DIR..."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The page; by default report.html in the first DIR.", metavar="FILE"
        ),
    ] = None,
    trace: Annotated[
        list[str] | None,
        typer.Option(
            help="Also map what this policy keeps, as in 'keydiff@25%'; may be given several times. Loads "
            "the model. Kept in the first DIR as traces.npz.",
            metavar="POLICY@BUDGET",
        ),
    ] = None,
    trace_task: Annotated[
        str | None,
        typer.Option(help="Task that the traced sample is from; by default the first.", metavar="TASK"),
    ] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Accuracy against bytes",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Make one HTML page of an evaluation: accuracy against measured bytes, needle maps, tables.

    The page needs no network. Its pictures (PNG) and tables (CSV) are also put into a folder beside it.
    """
    from modicum.report.page import write_report
    from modicum.report.results import Results

    results = Results.read(folders)
    page = (folders[0] if folders[0].is_dir() else folders[0].parent) / "report.html" if out is None else out
    traces = _traces(results, folders[0], trace or [], trace_task, device)
    made = write_report(results, page, traces=traces, title=title)
    if as_json:
        print_json(
            {
                "out": str(made.page),
                "rows": len(results.rows),
                "pictures": [str(path) for path in made.pictures],
                "tables": [str(path) for path in made.tables],
                "warnings": made.warnings,
                "front": made.front,
            }
        )
        return
    for warning in made.warnings:
        complain(f"warning: {warning}")
    print(f"{made.page}: {len(results.rows):,} rows, {len(made.pictures) // 2} pictures, light and dark")
    if made.front:
        print("best for their bytes, from few to many: " + ", ".join(made.front))


def _traces(
    results: Results, folder: Path, wanted: Sequence[str], task: str | None, device: str
) -> list[Trace]:
    """Those in the folder's file, and those asked for now, which are added to it."""
    from modicum.report.sampling import parse_wish, plan_traces
    from modicum.report.traces import TRACES, load_traces, save_traces

    folder = folder if folder.is_dir() else folder.parent
    path = folder / TRACES
    known = load_traces(path) if path.exists() else []
    if not wanted:
        if task is not None:
            raise InputError("--trace-task says where traces are from: give --trace POLICY@BUDGET too")
        return known
    plans = plan_traces(results, [parse_wish(text) for text in wanted], task)
    first = plans[0].cell
    model, tokenizer = load(first.model, first.dtype, device)
    for plan in plans:
        complain(f"tracing {plan.cell.policy} @ {plan.cell.budget}")
        made = plan.run(model, tokenizer)
        known = [t for t in known if t.key != made.key] + [made]
    save_traces(path, known)
    return known
