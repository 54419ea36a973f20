"""Pruning: the page of pruned models: what each layer lost, and what perplexity the bytes bought."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from modicum.report import losses
from modicum.report.page import Head, Report, Section, slug, write_page
from modicum.report.pruned import Pruned, Weight, labels, mean_error
from modicum.report.style import Look, dress, paint
from modicum.report.tables import Cell, Table, seconds, size

TITLE = "What pruning kept"

Named = Sequence[tuple[str, Pruned]]

_STAGES: tuple[tuple[str, Callable[[Weight], float | None]], ...] = (
    ("as chosen", lambda w: w.chosen),
    ("refined", lambda w: w.refined),
    ("updated", lambda w: w.updated),
)


def write_pruning(runs: Sequence[Pruned], out: str | Path, *, title: str = TITLE) -> Report:
    """Write the page of one pruned model, or of several that are compared, as `write_report` does.

    runs: as `read_pruned` gives them.

    Raises:
        InputError: the folder does not exist or cannot be written.
    """
    named = list(zip(labels(runs), runs, strict=True))
    count = "One pruned model" if len(runs) == 1 else f"{len(runs):,} pruned models"
    lead = "An error is the share of a layer's mean squared output that is lost on the calibration text."
    foot = "The dense bytes are the parameters', the packed ones the file's."
    head = Head(title, count, "modicum prune", lead, foot, _facts(runs), warnings(named))
    return write_page(out, head, _sections(named))


def warnings(named: Named) -> list[str]:
    """What is to be known before such runs are compared."""
    found = [
        f"the perplexity of {name} is no finite number"
        for name, run in named
        if not math.isfinite((run.before or 0) + (run.after or 0))
    ]
    before = [run.before for _, run in named if run.before is not None]
    if before and max(before) > 1.001 * min(before):
        found.append(
            "the perplexities before pruning differ, so they are not of the same held-back text or the same "
            "model: those after pruning cannot be compared"
        )
    unlike = [
        what
        for what, values in (
            ("as many tokens", {run.tokens for _, run in named}),
            ("the same source", {run.calibration for _, run in named}),
            ("the same seed", {run.seed for _, run in named}),
        )
        if len(values - {None}) > 1
    ]
    if unlike:
        text = ", ".join(unlike)
        found.append(f"not all runs calibrated on {text}: errors are of unlike texts")
    return found


def _facts(runs: Sequence[Pruned]) -> dict[str, list[str]]:
    def distinct(values: Iterable[str | None]) -> list[str]:
        return list(dict.fromkeys(value for value in values if value))

    first = runs[0]
    weights = sum(w.rows * w.width for w in first.weights)
    return {
        "model": distinct(", ".join(x for x in (run.model, run.dtype) if x) for run in runs),
        "patterns": distinct(run.how_much for run in runs),
        "budgets": distinct(run.budget for run in runs),
        "methods": distinct(run.method for run in runs),
        "refiners": distinct(run.settings for run in runs if run.settings != "none"),
        "updates": distinct(run.update for run in runs if run.update != "none"),
        "blocks share": distinct(run.layers for run in runs),
        "prunable": [f"{weights:,} weights in {len(first.weights):,} layers of {_blocks(first):,} blocks"],
        "calibration": distinct(_text_of(run) for run in runs),
        "held back": distinct(f"{run.held_back:,} tokens" for run in runs if run.held_back),
        "reports": distinct(str(run.path) for run in runs),
    }


def _text_of(run: Pruned) -> str:
    """What it was calibrated on: "2,048 tokens of book.txt (seed 0)"."""
    if not run.tokens:
        return run.calibration or ""
    source = "" if run.calibration is None else f" of {run.calibration}"
    return f"{run.tokens:,} tokens{source}" + ("" if run.seed is None else f" (seed {run.seed})")


def _sections(named: Named) -> Iterator[Section]:
    # Of too many, those of the lowest perplexity are labelled.
    style = dress({name: -(run.after if run.after is not None else math.inf) for name, run in named})
    yield _summary(named, style)
    yield _errors(named, style)
    uneven = [(name, run) for name, run in named if run.uneven]
    if uneven:
        yield _removed(uneven, style)
    text = (
        "The share of each layer's mean squared output that is lost: by the mask as it was chosen, after it "
        "was refined, and after kept weights were updated. Moved are the weights that refinement brought "
        "back. A click on a heading sorts."
    )
    yield Section("layers", "Layers", text, tables=(_layers(named),))


def _summary(named: Named, style: Mapping[str, Look]) -> Section:
    drawn = [(name, run) for name, run in named if run.packed_bytes and run.perplexities]
    pictures = []
    if len(drawn) > 1:
        told = "; ".join(f"{name} {run.after:.2f} at {size(run.packed_bytes or 0)}" for name, run in drawn)
        alt = f"Perplexity of held-back text against the packed file's bytes: {told}"
        pictures.append(paint("perplexity", alt, partial(losses.draw_perplexity, drawn, style)))
    text = _told(named[0][1]) if len(named) == 1 else "The same model, pruned in several ways."
    text += " Perplexity is of calibration text that was held back."
    if len(drawn) > 1:
        text += " The star is the model as it was; a line joins what one method made at several sizes."
    return Section("summary", "Summary", text, tuple(pictures), (_overview(named),))


def _told(run: Pruned) -> str:
    told = f"{run.removed:.1%} of the linear layers' weights are gone."
    if run.before is not None and run.after is not None:
        told += f" The perplexity was {run.before:,.2f} before, and is {run.after:,.2f} after."
    if run.dense_bytes and run.packed_bytes:
        told += f" Dense, the model takes {size(run.dense_bytes)}, packed {size(run.packed_bytes)}."
    return told


def _errors(named: Named, style: Mapping[str, Look]) -> Section:
    pictures = []
    if len(named) > 1:
        alt = "What each layer loses in the end, by kind of layer and block; on average " + "; ".join(
            f"{name} {_share(run.error)}" for name, run in named
        )
        lines = [losses.Line(name, style[name], run.weights, lambda w: w.updated) for name, run in named]
        draw = partial(losses.draw_errors, lines, "In the end, compared")
        pictures.append(paint("errors", alt, draw))
    stages = dress({stage: 0.0 for stage, _ in _STAGES})
    notes = []
    for index, (name, run) in enumerate(named):
        done = {"refined": run.refine != "none", "updated": run.update != "none"}
        lines = [
            losses.Line(stage, stages[stage], run.weights, error)
            for stage, error in _STAGES
            if done.get(stage, True)
        ]
        means = ", ".join(f"{_share(mean_error(run.weights, x.error))} {x.name}" for x in lines)
        alt = f"What each layer of {name} loses, by kind of layer and block; on average {means}"
        if len(lines) > 1 or len(named) == 1:  # else all of it is in the comparison
            # Numbered, as two labels may make the same file's name.
            part = f"errors-{index + 1}-{slug(name)}"
            pictures.append(paint(part, alt, partial(losses.draw_errors, lines, name)))
        worst = sorted((w for w in run.weights if w.updated is not None), key=lambda w: -(w.updated or 0))
        if worst:
            told = ", ".join(f"{w.short} ({_share(w.updated)})" for w in worst[: 3 if len(named) == 1 else 1])
            notes.append(f"{name}: on average {means}; in the end most in {told}.")
    text = (
        "Errors of each kind of layer through the blocks, on one logarithmic scale. Of experts, the line is "
        "the mean and the band goes from the least to the largest. Layers without error are not drawn."
    )
    return Section("errors", "What each layer loses", text, tuple(pictures), notes=tuple(notes))


def _removed(uneven: Named, style: Mapping[str, Look]) -> Section:
    told = []
    for name, run in uneven:
        shares = {block: run.removed_of(block) for block in {w.block for w in run.weights}}
        least, most = min(shares, key=lambda b: shares[b]), max(shares, key=lambda b: shares[b])
        told.append(f"{name}: {shares[least]:.1%} of block {least} to {shares[most]:.1%} of block {most}")
    alt = "Share removed by block; " + "; ".join(told)
    picture = paint("removed", alt, partial(losses.draw_removed, uneven, style))
    text = "Blocks were to lose unequal shares, together as much as was asked for."
    notes = tuple(f"{line}." for line in told)
    return Section("removed", "What each block gave", text, (picture,), notes=notes)


def _overview(named: Named) -> Table:
    return Table(
        name="summary",
        title="Pruned models",
        columns=(
            "model",
            "pattern",
            "asked",
            "removed",
            "perplexity before",
            "after",
            "mean error",
            "dense",
            "packed",
            "seconds",
            "peak memory",
        ),
        rows=tuple(
            (
                Cell(name, name),
                Cell(run.how_much, run.pattern),
                _percent(run.asked, "" if run.budget is None else f"for {run.budget}"),
                _percent(run.removed),
                _number(run.before, lambda x: f"{x:,.2f}"),
                _number(run.after, lambda x: f"{x:,.2f}"),
                _number(run.error, _share),
                _number(run.dense_bytes, size),
                _packed(run),
                _number(run.seconds, seconds),
                _number(run.peak_bytes, size),
            )
            for name, run in named
        ),
        extra=(
            ("method", tuple(run.method for _, run in named)),
            ("refine", tuple(run.refine for _, run in named)),
            ("update", tuple(run.update for _, run in named)),
            ("layers", tuple(run.layers for _, run in named)),
            ("refiner", tuple(run.settings for _, run in named)),
            ("budget", tuple(run.budget for _, run in named)),
            ("source", tuple(run.model for _, run in named)),
            ("dtype", tuple(run.dtype for _, run in named)),
            ("calibration", tuple(run.calibration for _, run in named)),
            ("seed", tuple(run.seed for _, run in named)),
            ("tokens", tuple(run.tokens for _, run in named)),
            ("held back", tuple(run.held_back for _, run in named)),
            ("report", tuple(str(run.path) for _, run in named)),
        ),
    )


def _layers(named: Named) -> Table:
    found = [(name, weight) for name, run in named for weight in run.weights]
    several = len(named) > 1
    return Table(
        name="layers",
        title="Every layer",
        columns=(
            "weight",
            *(("model",) if several else ()),
            "size",
            "removed",
            "error",
            "refined",
            "updated",
            "moved",
        ),
        rows=tuple(
            (
                Cell(w.short, w.name),
                *((Cell(name, name),) if several else ()),
                Cell(f"{w.rows:,} × {w.width:,}", f"{w.rows}x{w.width}", order=w.rows * w.width),
                _percent(w.removed),
                _number(w.chosen, _share),
                _number(w.refined, _share),
                _number(w.updated, _share),
                Cell(f"{w.moved:,}", w.moved),
            )
            for name, w in found
        ),
        extra=(
            ("block", tuple(w.block for _, w in found)),
            ("kind", tuple(w.kind for _, w in found)),
            ("kept", tuple(w.kept for _, w in found)),
            ("tokens", tuple(w.tokens for _, w in found)),
            ("seconds", tuple(w.seconds for _, w in found)),
        ),
    )


def _blocks(run: Pruned) -> int:
    return len({w.block for w in run.weights})


def _share(error: float | None) -> str:
    """As `modicum prune` prints it."""
    return "–" if error is None else f"{error:.4f}"


def _percent(share: float, note: str = "") -> Cell:
    return Cell(f"{100 * share:.1f} %", share, note)


def _number(value: float | None, shown: Callable[[float], str]) -> Cell:
    """A number that may be missing: then it sorts last."""
    return Cell("–", None, order=math.nan) if value is None else Cell(shown(value), value)


def _packed(run: Pruned) -> Cell:
    cell = _number(run.packed_bytes, size)
    if run.packed_bytes is None or not run.dense_bytes:
        return cell
    return Cell(cell.text, cell.value, f"{run.packed_bytes / run.dense_bytes:.0%}")
