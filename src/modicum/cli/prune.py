"""`modicum prune`: a smaller model out of a model and some text."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli.console import complain, load, print_json, print_table, progress_bar, settings_as_options
from modicum.cli.options import DeviceOption, DtypeOption, JsonOption, ModelOption
from modicum.errors import InputError

if TYPE_CHECKING:
    from modicum.weights.prune import PruneReport

_SETTINGS = (
    "method",
    "refine",
    "sparsity",
    "pattern",
    "budget",
    "layers",
    "update",
    "sequences",
    "length",
    "dtype",
)


def prune(
    model: ModelOption = "reference",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where the pruned model goes.", metavar="FOLDER")
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            help="packed: a smaller file, which modicum reads. dense: an ordinary checkpoint with zeros, as "
            "large as the model, for any software."
        ),
    ] = "packed",
    method: Annotated[str, typer.Option(help="magnitude, wanda, ria, sparsegpt or alps.")] = "wanda",
    refine: Annotated[str, typer.Option(help="dsnot, dsnot-guarded, dsnot-paper, swap or none.")] = "dsnot",
    sparsity: Annotated[
        float | None, typer.Option(help="The share of each row that goes; 0.6 if nothing else is given.")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help='"2:4" keeps 2 of each 4; "16x4" removes blocks.')
    ] = None,
    budget: Annotated[str | None, typer.Option(help='What the file may take, such as "120MiB".')] = None,
    layers: Annotated[str, typer.Option(help="How blocks share it: uniform, owl or atp.")] = "uniform",
    update: Annotated[
        str | None, typer.Option(help="Whether kept weights move: none, obs or lsq.", show_default=False)
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text to calibrate on: a file or a folder of .txt files; else the sample text."),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of it to look at.")] = 128,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens of each.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Which of them.")] = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Prune a model's linear layers without training, and write it, smaller or as an ordinary checkpoint.

    Perplexity is of calibration text that was held back. A run that is stopped goes on if it is started again
    with the same --out.
    """
    _check_output(out, format, budget)
    lm, tokenizer = load(model, dtype, device)
    from modicum.texts import sample_text
    from modicum.weights import calibration as calibrate
    from modicum.weights.checkpoint import save
    from modicum.weights.entry import prune as run
    from modicum.weights.new_folder import REPORT, STATE
    from modicum.weights.packed import dense_bytes
    from modicum.weights.perplexity import perplexity

    if sparsity is None and pattern is None and budget is None:
        sparsity = 0.6
    texts = [sample_text()] if calibration is None else calibrate.texts_in(calibration)
    size = length or calibrate.length_for(lm)
    held = max(1, sequences // 8)
    with settings_as_options(*_SETTINGS):
        ids = calibrate.tokens(texts, tokenizer, sequences, size, seed, held)
    before = perplexity(lm, ids[sequences:])
    with settings_as_options(*_SETTINGS), progress_bar() as progress:
        found = run(
            lm,
            ids[:sequences],
            method=method,
            refine=refine,
            sparsity=sparsity,
            pattern=pattern,
            budget=budget,
            layers=layers,
            update=update,
            resume=None if out is None else out / STATE,
            progress=progress,
        )
    after = perplexity(lm, ids[sequences:])
    told: dict[str, Any] = {"perplexity_before": before, "perplexity_after": after}
    told |= {"dense_bytes": dense_bytes(lm), "packed_bytes": None}
    told |= {"model": model, "dtype": str(lm.dtype).removeprefix("torch."), "refiner": refine, "seed": seed}
    told |= {"calibration": "the sample text" if calibration is None else str(calibration)}
    told |= {"held_back_tokens": ids[sequences:].numel(), "budget": budget}
    if out is not None:
        save(found, lm, tokenizer, out, format=format, details=told)
        shutil.rmtree(out / STATE, ignore_errors=True)
        told = json.loads((out / REPORT).read_text(encoding="utf-8"))
    else:
        told |= found.to_dict()
    if as_json:
        print_json(told)
        return
    _table(found)
    _summary(told, found, out)


def _check_output(out: Path | None, format: str, budget: str | None) -> None:
    """Refuse what could only fail when all of the work is done."""
    from modicum.weights.checkpoint import check_format
    from modicum.weights.new_folder import check_new

    check_format(format)
    if format == "dense" and out is None:
        raise InputError("--format dense writes a model, and there is no folder to write it to: give --out")
    if format == "dense" and budget is not None:
        raise InputError(
            f"--budget {budget} is the size of a packed file, and a dense checkpoint is as large as the "
            "model: give --sparsity, or --format packed"
        )
    if out is not None:
        check_new(out)


def _share(error: float | None) -> str:
    return "–" if error is None else f"{error:.4f}"


def _table(found: PruneReport) -> None:
    prefix = re.split(r"\d", found.table[0].name)[0]  # "model.layers."
    rows = [
        [
            row.name.removesuffix(".weight")[len(prefix) :],
            f"{row.rows} × {row.width}",
            f"{row.sparsity:.1%}",
            _share(row.error_before),
            _share(row.error_refined),
            _share(row.error_after),
            f"{row.changed:,}",
        ]
        for row in found.table
    ]
    head = ["weight", "size", "removed", "error", "refined", "updated", "moved"]
    print_table(head, rows, title="Share of each layer's squared output that is lost")


def _summary(told: dict[str, Any], found: PruneReport, out: Path | None) -> None:
    from modicum.kv.budget import format_size

    line = f"{found.achieved:.1%} of linear weights removed in {found.seconds:.0f} s; perplexity of "
    line += f"held-back text {told['perplexity_before']:.2f} before, {told['perplexity_after']:.2f} after"
    print(line)
    if out is not None:
        sizes = f"{format_size(told['file_bytes'])} {told['format']}"
        if told["format"] == "packed":
            sizes = f"{format_size(told['dense_bytes'])} dense, {sizes}"
        print(f"{sizes}: {out}")
        complain(f"use it as --model {out}")
