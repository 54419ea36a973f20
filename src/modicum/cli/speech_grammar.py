"""`modicum speech grammar`: voice commands with the spellings that an acoustic model hears for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli.console import complain, print_json, print_table, progress_bar
from modicum.cli.options import JsonOption
from modicum.errors import InputError

if TYPE_CHECKING:
    from modicum.speech.grammar.entry import GrammarReport
    from modicum.speech.grammar.evaluation import GrammarRates
    from modicum.speech.scoring import Rate

app = typer.Typer(
    no_args_is_help=True, help="Add to voice commands what a small model hears instead of them."
)

GRAMMAR, DICTIONARY, PAGE = "grammar.json", "dictionary.json", "report.html"

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="The acoustic model: embedded, pocketsphinx, or a recognizer's folder or file.",
        metavar="MODEL",
    ),
]
OthersOption = Annotated[
    Path,
    typer.Option("--others", help="Speech that is no command: a folder, or a manifest.", metavar="AUDIO"),
]
PiecesOption = Annotated[
    float | None,
    typer.Option("--pieces", help="Cut other speech into pieces of so many seconds.", show_default=False),
]
RateOption = Annotated[
    float, typer.Option("--false-alarms", help="Share of other speech that may be taken for a command.")
]
GrammarArgument = Annotated[
    Path, typer.Argument(help="A grammar.json, or the folder that search wrote.", metavar="GRAMMAR")
]
RecordingsArgument = Annotated[
    Path,
    typer.Argument(
        help="Recordings of the commands: a folder for each (turn_on/…), or a manifest.", metavar="RECORDINGS"
    ),
]


@app.command("learn")
def learn(
    speech: Annotated[
        Path,
        typer.Argument(help="General speech with transcripts: a folder, or a manifest.", metavar="MANIFEST"),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the dictionary goes.", metavar="FILE")],
    model: ModelOption = "embedded",
    decodes: Annotated[int, typer.Option(help="Of each recording; 1 for greedy decoding alone.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Count what a model hears for each word of general speech.

    For search, which otherwise learns from the recordings of the commands.
    """
    from modicum.speech.grammar import learn_dictionary, open_model, read_recordings
    from modicum.speech.grammar.score_table import readable

    spoken = read_recordings(speech)
    opened = open_model(model)
    with progress_bar() as progress:
        recordings = readable(opened, spoken, progress)
        dictionary = learn_dictionary(opened, recordings, decodes, progress)
    dictionary.save(out)
    words = sorted(dictionary.counts, key=lambda word: (-sum(dictionary.counts[word].values()), word))
    if as_json:
        print_json({"words": len(words), "recordings": len(recordings), "dictionary": str(out)})
        return
    rows = [
        [word, ", ".join(f"{form} {share:.0%}" for form, share in dictionary.variants(word, 4))]
        for word in words[:10]
    ]
    print_table(["word", "heard"], rows)
    print(f"{len(words):,} words of {len(recordings):,} recordings: {out}")
    complain(f"use it as search --dictionary {out}")


@app.command("search")
def search(
    commands: Annotated[Path, typer.Argument(help="A text file, a command a line.", metavar="COMMANDS")],
    recordings: RecordingsArgument,
    others: OthersOption,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Gets grammar.json and report.html.", metavar="FOLDER")
    ],
    model: ModelOption = "embedded",
    dictionary: Annotated[
        Path | None,
        typer.Option(
            help="That learn wrote; by default learned from the recordings.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    pieces: PiecesOption = None,
    false_alarms: RateOption = 0.01,
    method: Annotated[
        str, typer.Option(help="refine (greedy with refinement), greedy, or cem (cross-entropy method).")
    ] = "refine",
    threshold: Annotated[
        str, typer.Option(help="While searching: refit for every grammar, or fixed as the original one's.")
    ] = "refit",
    candidates: Annotated[int, typer.Option(help="Of each command at most.")] = 40,
    most: Annotated[int | None, typer.Option(help="Expressions added at most.", show_default=False)] = None,
    held_out: Annotated[float, typer.Option(help="Share of recordings to measure with.")] = 0.3,
    weights: Annotated[
        str, typer.Option(help="Of missed, misclassified and false alarms in the search.")
    ] = "1,1,1",
    seed: Annotated[int, typer.Option(help="Of the division and the search.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Find expressions of the commands that lower errors at the same rate of false alarms.

    Nothing is trained. The recordings are divided: the search sees one part, the table is of the other.
    """
    from modicum.speech.grammar import (
        CandidateSettings,
        GrammarSettings,
        PronunciationDictionary,
        open_model,
        read_commands,
        read_other_speech,
        read_recordings,
        search_grammar,
        write_search_page,
    )

    settings = GrammarSettings(
        false_alarm_rate=false_alarms,
        method=_one_of("--method", method, ("cem", "greedy", "refine")),
        threshold=_one_of("--threshold", threshold, ("refit", "fixed")),
        max_added=most,
        held_out=held_out,
        candidates=CandidateSettings(num_variants=max(40, candidates), num_candidates=candidates),
        objective=_objective(weights),
        seed=seed,
    )
    texts = read_commands(commands)
    known = None if dictionary is None else PronunciationDictionary.load(dictionary)
    own, foreign = read_recordings(recordings), read_other_speech(others, pieces)
    opened = open_model(model)
    with progress_bar() as progress:
        report = search_grammar(opened, texts, own, foreign, settings, dictionary=known, progress=progress)
    report.grammar.save(out / GRAMMAR)
    write_search_page(report, out / PAGE)
    if as_json:
        print_json(report.to_dict())
        return
    _summary(report, false_alarms, out)


@app.command("evaluate")
def evaluate(
    grammar: GrammarArgument,
    recordings: RecordingsArgument,
    others: OthersOption,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="By default that of the grammar.", metavar="MODEL", show_default=False
        ),
    ] = None,
    pieces: PiecesOption = None,
    false_alarms: RateOption = 0.01,
    page: Annotated[
        Path | None, typer.Option(help="Write an HTML page here.", metavar="FILE", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Rates of errors of a grammar and of the original one, on recordings that the search has not seen."""
    from modicum.speech.grammar import (
        Grammar,
        evaluate_grammar,
        open_model,
        read_other_speech,
        read_recordings,
        write_evaluation_page,
    )

    loaded = Grammar.load(_file(grammar))
    own, foreign = read_recordings(recordings), read_other_speech(others, pieces)
    opened = open_model(model or loaded.model)
    with progress_bar() as progress:
        found = evaluate_grammar(opened, loaded, own, foreign, false_alarms, progress=progress)
    if page is not None:
        write_evaluation_page(loaded, found, false_alarms, page)
    if as_json:
        print_json([one.to_dict() for one in found])
        return
    _table(found, false_alarms)


@app.command("export")
def export(
    grammar: GrammarArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Gets the files.", metavar="FOLDER")],
    as_json: JsonOption = False,
) -> None:
    """Write a JSGF and a dictionary that pocketsphinx runs, and a keywords file for sherpa-onnx."""
    from modicum.speech.grammar import Grammar, export_grammar

    files = export_grammar(Grammar.load(_file(grammar)), out)
    if as_json:
        print_json({name: None if path is None else str(path) for name, path in vars(files).items()})
        return
    print(f"{files.jsgf}, {files.dictionary}" + ("" if files.keywords is None else f", {files.keywords}"))
    complain(
        f"run it in Python: pocketsphinx.Decoder(jsgf={str(files.jsgf)!r}, dict={str(files.dictionary)!r})"
    )


def _summary(report: GrammarReport, rate: float, out: Path) -> None:
    seen, seen_others, kept, kept_others = report.num_recordings
    _table(report.held_out or report.searched, rate)
    if report.held_out:
        whose = "other speakers'" if report.are_speakers_known else "speakers not known"
        print(f"on {kept:,} recordings of commands and {kept_others:,} of other speech, held out ({whose})")
    else:
        print(f"on the {seen:,} and {seen_others:,} recordings of the search itself: too good to be true")
    added = len(report.grammar.expressions) - report.grammar.num_original
    print(
        f"{added:,} of {report.num_candidates:,} candidates added to "
        f"{report.grammar.num_original:,} expressions"
    )
    print(f"{out / GRAMMAR}, {out / PAGE}")
    complain(f"write a JSGF for pocketsphinx: modicum speech grammar export {out} --out FOLDER")


def _table(found: Any, rate: float) -> None:
    rows = []
    for one in found:
        rows.append(_row(one, "as searched", one.fixed))
        if one.equal is not None:
            rows.append(_row(one, f"for {rate:.1%} here", one.equal))
    print_table(["grammar", "size", "threshold", "missed", "confused", "false alarms"], rows)


def _row(one: GrammarRates, threshold: str, rates: Any) -> list[str]:
    cells = [_percent(x) for x in (rates.missed, rates.misclassified, rates.false_alarms)]
    return [one.name, f"{one.size:,}", threshold, *cells]


def _percent(rate: Rate) -> str:
    return f"{rate.value:.1%} [{rate.low:.0%}, {rate.high:.0%}]"


def _file(grammar: Path) -> Path:
    return grammar / GRAMMAR if grammar.is_dir() else grammar


def _one_of(option: str, value: str, names: tuple[str, ...]) -> Any:
    if value not in names:
        raise InputError(f"{option} is {value!r}: choose one of {', '.join(names)}")
    return value


def _objective(weights: str) -> Any:
    from modicum.speech.grammar import ObjectiveSettings

    try:
        missed, misclassified, alarms = (float(one) for one in weights.split(","))
    except ValueError as error:
        raise InputError(
            f"--weights is {weights!r}: give three numbers with commas between, as 1,1,1"
        ) from error
    return ObjectiveSettings(missed, misclassified, alarms)
