"""`modicum report`: a page, pictures and tables of what `modicum eval` measured, or `modicum prune` wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli.console import complain, load, print_json
from modicum.cli.options import DeviceOption, JsonOption
from modicum.errors import InputError

if TYPE_CHECKING:
    from modicum.report.page import Report
    from modicum.report.results import Results
    from modicum.report.trace import Trace


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="What `modicum eval --out` wrote (several are joined) or `modicum prune --out` (compared).",
            metavar="DIR...",
        ),
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
    title: Annotated[str | None, typer.Option(help="Heading of the page.", show_default=False)] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Make one HTML page of evaluations, or of pruned models.

    Of evaluations: accuracy against measured bytes, needle maps, tables.

    Of pruned models: what each layer lost, perplexity against bytes, tables.

    The page needs no network. Its pictures (PNG) and tables (CSV) are also put into a folder beside it.
    """
    from modicum.report.pruned import holds_pruned

    page = (folders[0] if folders[0].is_dir() else folders[0].parent) / "report.html" if out is None else out
    if holds_pruned(folders):
        if trace or trace_task is not None:
            raise InputError("--trace maps what a cache keeps, and these are pruned models: leave it out")
        _pruning(folders, page, title, as_json)
    else:
        traced = partial(_traces, folder=folders[0], wanted=trace or [], task=trace_task, device=device)
        _evaluation(folders, page, title, traced, as_json)


def _evaluation(
    folders: Sequence[Path],
    page: Path,
    title: str | None,
    traced: Callable[[Results], list[Trace]],
    as_json: bool,
) -> None:
    from modicum.report.page import TITLE, write_report
    from modicum.report.results import Results

    results = Results.read(folders)
    made = write_report(results, page, traces=traced(results), title=title or TITLE)
    if as_json:
        print_json({**_written(made), "rows": len(results.rows), "front": made.front})
        return
    _say(made, f"{len(results.rows):,} rows")
    if made.front:
        print("best for their bytes, from few to many: " + ", ".join(made.front))


def _pruning(folders: Sequence[Path], page: Path, title: str | None, as_json: bool) -> None:
    from modicum.report.pruned import labels, read_pruned
    from modicum.report.pruning import TITLE, write_pruning
    from modicum.report.tables import size

    runs = read_pruned(folders)
    made = write_pruning(runs, page, title=title or TITLE)
    names = labels(runs)
    if as_json:
        models = [
            {
                "model": name,
                "report": str(run.path),
                "removed": run.removed,
                "perplexity_before": run.before,
                "perplexity_after": run.after,
                "packed_bytes": run.packed_bytes,
                "error": run.error,
            }
            for name, run in zip(names, runs, strict=True)
        ]
        print_json({**_written(made), "models": models})
        return
    _say(made, "1 pruned model" if len(runs) == 1 else f"{len(runs):,} pruned models")
    known = [
        (run.perplexities[1], name, run) for name, run in zip(names, runs, strict=True) if run.perplexities
    ]
    if known:
        after, name, run = min(known, key=lambda item: item[0])
        place = "" if run.packed_bytes is None else f" at {size(run.packed_bytes)}"
        print(f"{'lowest ' if len(runs) > 1 else ''}perplexity after pruning: {after:,.2f}{place}, {name}")


def _written(made: Report) -> dict[str, Any]:
    return {
        "out": str(made.page),
        "pictures": [str(path) for path in made.pictures],
        "tables": [str(path) for path in made.tables],
        "warnings": made.warnings,
    }


def _say(made: Report, what: str) -> None:
    for warning in made.warnings:
        complain(f"warning: {warning}")
    count = len(made.pictures) // 2
    print(f"{made.page}: {what}, {count} picture{'' if count == 1 else 's'}, light and dark")


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
