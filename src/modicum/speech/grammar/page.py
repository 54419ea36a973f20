"""Page: a grammar's rates, its expressions and its trade-off curve as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from modicum.report.page import Head, Report, Section, write_page
from modicum.report.style import Theme, dress, legend, paint
from modicum.report.tables import Cell, Table
from modicum.speech.grammar.entry import GrammarReport
from modicum.speech.grammar.evaluation import GrammarRates
from modicum.speech.grammar.grammar_file import Grammar
from modicum.speech.scoring import Rate

TITLE = "Voice commands that are understood"


def write_search_page(report: GrammarReport, out: str | Path) -> Report:
    """The page of a search.

    Raises:
        InputError: the folder does not exist or cannot be written.
    """
    seen, seen_others, kept, kept_others = report.num_recordings
    rate = report.grammar.about["settings"]["false_alarm_rate"]
    sections = []
    if report.held_out:
        whose = (
            "No speaker is in both."
            if report.are_speakers_known
            else "Not all speakers are known, so some may be in both."
        )
        text = (
            f"{kept:,} recordings of commands and {kept_others:,} of other speech, not seen by the search. "
        )
        sections.append(_section("held-out", "Held-out recordings", text + whose, report.held_out, rate))
    text = (
        f"{seen:,} recordings of commands and {seen_others:,} of other speech that the search has seen: "
        "too good to be true of others."
    )
    sections.append(_section("searched", "Recordings of the search", text, report.searched, rate))
    sections.append(_expressions(report.grammar))
    facts = _facts(report.grammar) | {
        "candidates": [f"{report.num_candidates:,}"],
        "search": [
            f"{report.grammar.about['settings']['method']}, {report.result.num_evaluations:,} sets in "
            f"{report.seconds:.1f} s"
        ],
    }
    return write_page(out, _head(report.grammar, "modicum speech grammar search", facts), sections)


def write_evaluation_page(
    grammar: Grammar, found: Sequence[GrammarRates], rate: float, out: str | Path
) -> Report:
    """The page of an evaluation.

    Raises:
        InputError: the folder does not exist or cannot be written.
    """
    text = (
        f"{found[0].fixed.missed.total:,} recordings of commands and "
        f"{found[0].fixed.false_alarms.total:,} of other speech."
    )
    sections = [_section("rates", "Rates", text, found, rate), _expressions(grammar)]
    return write_page(out, _head(grammar, "modicum speech grammar evaluate", _facts(grammar)), sections)


def _head(grammar: Grammar, command: str, facts: dict[str, list[str]]) -> Head:
    lead = (
        "Missed: a command that is rejected. Misclassified: taken for another. False alarm: other speech "
        "that is taken for a command."
    )
    return Head(
        TITLE,
        f"{len(grammar.commands):,} commands",
        command,
        lead,
        "Intervals are of 95 %, by resampling recordings 1,000 times.",
        facts,
    )


def _facts(grammar: Grammar) -> dict[str, list[str]]:
    return {
        "model": [grammar.model],
        "expressions": [f"{len(grammar.expressions):,}, of which {grammar.num_original:,} original"],
        "threshold": [f"{grammar.threshold:.2f}; of the original grammar {grammar.original_threshold:.2f}"],
    }


def _section(anchor: str, title: str, text: str, found: Sequence[GrammarRates], rate: float) -> Section:
    told = "; ".join(f"{one.name} misses {one.fixed.missed.value:.1%}" for one in found)
    alt = f"Commands not understood against false alarms: {told}"
    picture = paint(f"trade-off-{anchor}", alt, partial(_draw, found))
    notes = []
    if any(one.equal is None for one in found):
        notes.append(
            f"There is too little other speech here for a threshold of {rate:.2%} false alarms: the rows for "
            "it are left out."
        )
    return Section(anchor, title, text, (picture,), (_table(anchor, found, rate),), tuple(notes))


def _table(anchor: str, found: Sequence[GrammarRates], rate: float) -> Table:
    rows = []
    for one in found:
        for what, rates in (
            ("as set by the search", one.fixed),
            (f"{rate:.2%} false alarms here", one.equal),
        ):
            if rates is not None:
                rows.append(
                    (
                        Cell(one.name, one.name),
                        Cell(what, what),
                        Cell(f"{one.size:,}", one.size),
                        *(_cell(x) for x in (rates.missed, rates.misclassified, rates.false_alarms)),
                    )
                )
    columns = ("grammar", "threshold", "expressions", "missed", "misclassified", "false alarms")
    return Table(f"rates-{anchor}", "Rates", columns, tuple(rows))


def _cell(rate: Rate) -> Cell:
    return Cell(
        f"{rate.value:.1%}",
        rate.value,
        f"{rate.low:.1%} to {rate.high:.1%}, {rate.count:,} of {rate.total:,}",
    )


def _expressions(grammar: Grammar) -> Section:
    rows = []
    for index, command in enumerate(grammar.commands):
        for at, one in enumerate(grammar.expressions):
            if one.command == index:
                is_original = at < grammar.num_original
                kind = "original" if is_original else "added"
                share = Cell("–", 1.0) if is_original else Cell(f"{one.probability:.2%}", one.probability)
                rows.append((Cell(command, command), Cell(one.text, one.text), Cell(kind, kind), share))
    table = Table("expressions", "Expressions", ("command", "expression", "kind", "heard"), tuple(rows))
    text = "What the model listens for. Heard: the product of P(form | word) over the words."
    return Section("expressions", "Expressions of each command", text, (), (table,))


def _draw(found: Sequence[GrammarRates], theme: Theme) -> Any:
    """A matplotlib Figure: missed and misclassified commands against false alarms."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    with matplotlib.rc_context(theme.settings):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axis = figure.subplots()
        style = dress({one.name: 0.0 for one in found})
        entries: dict[str, Any] = {}
        for one in found:
            look = style[one.name]
            colour = look.colour or theme.ink
            points = [(p.false_alarms, p.missed + p.misclassified) for p in one.curve]
            (entries[one.name],) = axis.plot(*zip(*points, strict=True), color=colour, drawstyle="steps-post")
            fixed = one.fixed
            axis.plot(fixed.false_alarms.value, fixed.wrong, look.marker, color=colour, markersize=8)
        # Few false alarms matter most; a linear stretch keeps zero on the axis.
        least = 1 / max(one.fixed.false_alarms.total for one in found)
        axis.set_xscale("symlog", linthresh=max(least, 1e-3))
        axis.set_xlim(0, 1)
        axis.set_ylim(0, None)
        axis.grid(alpha=0.4)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.set_xlabel("false alarms, of recordings of other speech")
        axis.set_ylabel("missed or misclassified commands")
        legend(figure, entries)
        return figure
