"""Page: what each layer gave up, as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from modicum.fit.fit_report import FitReport
from modicum.fit.weight_option import DENSE
from modicum.kv.budget import format_size
from modicum.report.page import Head, Section, write_page
from modicum.report.tables import Cell, Table

PAGE = "fit.html"


def write_fit_page(report: FitReport, model: str, folder: Path) -> Path:
    """Write `fit.html` into the folder of the fitted model; its path.

    Raises:
        InputError: it cannot be written.
    """
    target, check = report.target, report.check
    head = Head(
        f"{model} in {format_size(target.nbytes)}",
        "One fitted model",
        "modicum fit",
        "Errors are Kullback-Leibler divergences of the next token from the model as it was, in nats.",
        "Bytes are of the weights and buffers as a run holds them and of the caches between calls. "
        "Activations, the chunk in hand and the program come on top.",
        {
            "memory": [f"{format_size(report.nbytes)} of {format_size(target.nbytes)}"],
            "as it was": [format_size(report.dense_nbytes)],
            "weights": [format_size(report.weights_nbytes)],
            "cache": [f"{format_size(report.cache_nbytes)} for each of {target.batch}"],
            "context": [f"{target.context:,} tokens"],
            "file": [format_size(report.file_bytes)] if report.file_bytes else [],
            "error in text": [f"{report.errors.text:.4f}"],
            "error in answers": [f"{report.errors.answers:.4f}"],
            "answers kept": [f"{report.errors.kept:.0%}"],
            "loss": [f"{report.loss:.4f}, predicted {report.plan.predicted:.4f}"],
            "Kendall's τ": [
                f"{check.tau:.2f} over {check.samples} assembled models, of bytes alone {check.bytes_tau:.2f}"
            ]
            if check.samples
            else [],
        },
    )
    return write_page(folder / PAGE, head, _sections(report)).page


def _sections(report: FitReport) -> Iterator[Section]:
    yield Section(
        "parts",
        "What each layer gave up",
        "The option of each layer's attention and MLP: what it saves, and what it costs with this part alone "
        "replaced. The last column is the noise-to-signal ratio of the layer's output.",
        tables=(_parts(report),),
    )
    cache = report.plan.cache
    yield Section(
        "cache",
        "Cache",
        f"{cache.tokens:,} slots per KV head on average, {cache.share:.1%} of {cache.context:,} tokens, in "
        f"the form “{cache.store}”, divided over heads by the policy {report.settings.policy}.",
        tables=(_candidates(report),),
        notes=(
            "Each candidate was assembled from the library and measured with its cache on probes of "
            f"{report.probe_length:,} tokens; the first was taken."
            + (" Its weights were then pruned again in order, which lost less." if report.in_order else ""),
        ),
    )
    yield Section(
        "library",
        "All that was measured",
        "Each part at each option, in the model as it was but for that part.",
        tables=(_library(report),),
        notes=(f"Left out, as their errors are not numbers: {', '.join(report.left_out)}.",)
        if report.left_out
        else (),
    )


def _parts(report: FitReport) -> Table:
    known = {(v["part"], v["option"]): v for v in report.variants}
    rows = []
    for name, option in report.plan.options.items():
        chosen, dense = known[name, option], known[name, DENSE]
        rows.append(
            (
                Cell(name, name),
                Cell(option, option),
                _size(dense["bytes"]),
                _size(chosen["bytes"]),
                _error(chosen["text"]),
                _error(chosen["answers"]),
                _error(chosen.get("nsr", 0.0)),
            )
        )
    columns = ("part", "weights", "dense", "held", "error in text", "error in answers", "noise to signal")
    return Table("parts", "Parts", columns, tuple(rows))


def _candidates(report: FitReport) -> Table:
    rows = []
    for one in report.candidates:
        plan = one.plan
        rows.append(
            (
                Cell(plan.how, plan.how),
                Cell(plan.cache.store, plan.cache.store),
                Cell(f"{plan.cache.tokens:,}", plan.cache.tokens),
                _size(plan.weights_nbytes),
                _size(report.target.batch * plan.cache_nbytes),
                _error(plan.predicted),
                _error(one.loss),
                _error(one.errors.text),
                _error(one.errors.answers),
                Cell(f"{one.errors.kept:.0%}", one.errors.kept),
            )
        )
    columns = (
        "plan",
        "slots in",
        "slots",
        "weights",
        "caches",
        "predicted loss",
        "loss",
        "error in text",
        "error in answers",
        "answers kept",
    )
    return Table("candidates", "Candidates", columns, tuple(rows))


def _library(report: FitReport) -> Table:
    rows = tuple(
        (
            Cell(v["part"], v["part"]),
            Cell(v["option"], v["option"]),
            _size(v["bytes"]),
            _error(v["text"]),
            _error(v["answers"]),
            _error(v.get("nsr", 0.0)),
        )
        for v in report.variants
    )
    columns = ("part", "weights", "held", "error in text", "error in answers", "noise to signal")
    return Table("library", "Library", columns, rows)


def _size(nbytes: int) -> Cell:
    return Cell(format_size(nbytes), nbytes)


def _error(value: float) -> Cell:
    return Cell(f"{value:.4f}", value)
