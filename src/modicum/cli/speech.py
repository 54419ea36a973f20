"""`modicum speech`: recognizers that are trained, used and evaluated."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli import speech_grammar
from modicum.cli.console import complain, print_json, print_table, progress_bar
from modicum.cli.options import JsonOption
from modicum.cli.speech_pack import export, pack
from modicum.cli.speech_quantize import quantize
from modicum.cli.speech_stream import stream_text
from modicum.cli.speech_synth import synth
from modicum.errors import InputError, ModicumError

if TYPE_CHECKING:
    from modicum.speech.corpus import FeatureCorpus
    from modicum.speech.entry import TrainReport, TrainSettings
    from modicum.speech.evaluation import Evaluation
    from modicum.speech.features import FeatureSettings
    from modicum.speech.recognizer import Recognizer
    from modicum.speech.scoring import Rate

app = typer.Typer(no_args_is_help=True, help="Train, use and evaluate small speech recognizers.")
app.command("synth")(synth)
app.command("pack")(pack)
app.command("export")(export)
app.command("quantize")(quantize)
app.add_typer(speech_grammar.app, name="grammar")

ManifestArgument = Annotated[
    Path,
    typer.Argument(
        help="A folder of audio with transcripts, a .jsonl manifest, or lines file<TAB>text.",
        metavar="MANIFEST",
    ),
]
BeamOption = Annotated[int, typer.Option(help="Prefixes of a CTC prefix beam search; 0 for greedy decoding.")]
_OPTIONS = {
    "hard_weight": "--hard-weight",
    "batch_seconds": "--batch-seconds",
    "learning_rate": "--rate",
    "num_mels": "--mels",
}
_SETTING = re.compile(rf"\b({'|'.join(_OPTIONS)})(?= is )")


@app.command("train")
def train(
    manifest: ManifestArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the recognizer goes.", metavar="FOLDER")],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="conv, dfsmn, convdfsmn, wav2letter or sanm (CTC), or frames (a phone for each frame).",
        ),
    ] = "conv",
    size: Annotated[str, typer.Option(help="tiny, small or base.")] = "small",
    units: Annotated[str, typer.Option(help="Classes of a CTC model: graphemes or phones.")] = "graphemes",
    epochs: Annotated[int, typer.Option(help="How often each utterance is seen.")] = 20,
    rate: Annotated[float, typer.Option(help="The highest learning rate.")] = 3e-3,
    batch_seconds: Annotated[float, typer.Option(help="Seconds of audio in a step.")] = 30.0,
    mels: Annotated[int, typer.Option(help="Mel channels of the features; with teachers theirs.")] = 40,
    copies: Annotated[int, typer.Option(help="Perturbed copies of each utterance, one seen an epoch.")] = 1,
    speeds: Annotated[
        str, typer.Option(help="Speed factors of the copies in turn, such as 1,0.9,1.1.")
    ] = "1",
    noise: Annotated[
        str, typer.Option(help="Add noise at a ratio in dB between these, such as 0,20.", show_default=False)
    ] = "",
    spec_augment: Annotated[bool, typer.Option(help="Mask bands of the features in training.")] = True,
    teacher: Annotated[
        str,
        typer.Option(
            help="Recognizers to learn from, with commas between; of several the mean.",
            metavar="FOLDERS",
            show_default=False,
        ),
    ] = "",
    keep: Annotated[
        str, typer.Option(help="Classes kept of each frame: topk=10, threshold=0.01 or mass=0.95.")
    ] = "topk=10",
    bits: Annotated[int, typer.Option(help="Of a recorded probability: 8 or 16.")] = 8,
    hard_weight: Annotated[float, typer.Option(help="Weight of the correct labels, 0 to 1.")] = 0.5,
    temperature: Annotated[float, typer.Option(help="Divides teachers' and student's logits.")] = 1.0,
    tail: Annotated[
        str, typer.Option(help="Probability not kept: renormalize, drop, or one bin for it.")
    ] = "renormalize",
    features: Annotated[
        Path | None,
        typer.Option(help="Compute features here and keep them for other runs.", metavar="FOLDER"),
    ] = None,
    targets: Annotated[
        Path | None,
        typer.Option(help="Record the teachers' targets here and keep them.", metavar="FOLDER"),
    ] = None,
    streamable: Annotated[
        bool,
        typer.Option(
            "--streamable",
            help="For transcribe --stream and sherpa-onnx: features as these have them, limited attention.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of weights, order and masks.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Train a recognizer on audio with transcripts, alone or from teachers.

    A run that is stopped goes on if it is started again with the same --out.
    """
    with _settings_as_options():
        from modicum.distill.essence import check_tail
        from modicum.speech.compact.context import model_context
        from modicum.speech.compact.streaming import streamable_features, streamable_model
        from modicum.speech.corpus import CorpusSettings
        from modicum.speech.entry import TrainSettings, check_units, train_recognizer
        from modicum.speech.features import FeatureSettings
        from modicum.speech.noise import NoiseSettings
        from modicum.speech.recipe import Recipe
        from modicum.speech.sizes import model_settings
        from modicum.speech.teaching import TeachingSettings

        sizes = model_settings(model, size)
        if streamable:
            sizes = streamable_model(sizes)
            model_context(sizes)  # refuses what could not be streamed after the training
        recipe = Recipe(
            model=sizes,
            epochs=epochs,
            batch_seconds=batch_seconds,
            learning_rate=rate,
            spec_augment=spec_augment,
            hard_weight=hard_weight,
            tail=check_tail(tail),
            seed=seed,
        )
        ratios = _numbers("noise", noise)
        if len(ratios) not in (0, 2):
            raise InputError(f"noise is {noise!r}: give the lowest and the highest ratio, as in 0,20")
        added = NoiseSettings((ratios[0], ratios[1])) if ratios else None
        inputs = streamable_features(mels) if streamable else FeatureSettings(num_mels=mels)
        # Members of an ensemble share features: --seed has no part in them.
        corpus = CorpusSettings(inputs, copies, _numbers("speeds", speeds), added)
        settings = TrainSettings(
            recipe, corpus, TeachingSettings(keep, bits, temperature), check_units(units), features, targets
        )
        teachers = [name for name in teacher.split(",") if name]
        if teacher and not teachers:
            raise InputError(f"teacher is {teacher!r}: give folders of recognizers")
        with progress_bar() as progress:
            report = train_recognizer(manifest, out, settings, teachers, progress)
    if as_json:
        print_json(report.to_dict())
        return
    _summary(report, settings, out)


@app.command("transcribe")
def transcribe(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Audio: wav, flac, ogg or opus.", metavar="FILE...", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="The recognizer; by default the embedded one, of few words.",
            metavar="MODEL",
            show_default=False,
        ),
    ] = None,
    beam: BeamOption = 0,
    words: Annotated[
        Path | None,
        typer.Option(
            help="Write only words of this text file; the embedded model has a list of its own.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Write text as audio arrives; without a FILE from a microphone.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write what is said in audio files, a line for each.

    Of several files, those that cannot be read are named, and the others transcribed.
    """
    from modicum.speech.compact.embedded import embedded_recognizer
    from modicum.speech.recognizer import Recognizer

    recognizer = embedded_recognizer() if model is None else Recognizer.load(model)
    if stream:
        if beam or as_json or words is not None:
            raise InputError("--stream writes text by greedy decoding: leave out --beam, --words and --json")
        stream_text(recognizer, files or [])
        return
    if not files:
        raise InputError("there is no file: give audio to transcribe, or --stream for a microphone")
    decoder = _transcribing(recognizer, model is None, beam, words)
    rows: list[dict[str, Any]] = []
    for path in files:
        try:
            transcript = recognizer.transcribe(path, decoder)
        except InputError as error:
            if len(files) == 1:
                raise
            complain(f"error: {error}")
            continue
        rows.append({"audio": _shown(path), "text": transcript.text, "seconds": transcript.seconds})
        if not as_json:
            print(f"{_shown(path)}\t{transcript.text}" if len(files) > 1 else transcript.text, flush=True)
    if as_json:
        print_json(rows)
    if not rows:
        raise InputError(f"none of the {len(files)} files could be transcribed: give audio with speech")


@app.command("evaluate")
def evaluate(
    manifest: ManifestArgument,
    model: Annotated[
        list[str],
        typer.Option(
            "--model",
            "-m",
            help="A recognizer, or an ensemble of several with commas between; give it again for more rows.",
            metavar="FOLDERS",
        ),
    ],
    beam: BeamOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Error rates of recognizers on audio with transcripts, with 95 % intervals."""
    from modicum.speech.corpus import CorpusSettings, build_corpus
    from modicum.speech.evaluation import evaluate as run
    from modicum.speech.manifest import read_manifest
    from modicum.speech.recognizer import Recognizer

    groups = [[name for name in names.split(",") if name] for names in model]
    if not all(groups):
        raise InputError(f"model is {','.join(model)!r}: give folders of recognizers")
    decoder = _decoder(beam)
    loaded = [[Recognizer.load(name) for name in names] for names in groups]
    utterances = read_manifest(manifest)
    found: list[Evaluation] = []
    with tempfile.TemporaryDirectory() as folder, progress_bar() as progress:
        corpora: dict[FeatureSettings, FeatureCorpus] = {}
        for members in loaded:
            features = members[0].features
            if features not in corpora:
                place = Path(folder) / str(len(corpora))
                corpora[features] = build_corpus(utterances, place, CorpusSettings(features), progress)
            found.append(run(members, corpora[features], decoder=decoder, progress=progress))
    if as_json:
        print_json([{"model": names} | one.to_dict() for names, one in zip(groups, found, strict=True)])
        return
    _table(groups, loaded, found)


def _table(
    groups: Sequence[Sequence[str]], loaded: Sequence[Sequence[Recognizer]], found: Sequence[Evaluation]
) -> None:
    columns = {
        "WER": [one.word_error_rate for one in found],
        "CER": [one.character_error_rate for one in found],
        "PER": [one.phone_error_rate for one in found],
        "frames right": [one.frame_accuracy for one in found],
    }
    shown = {name: rates for name, rates in columns.items() if any(rates)}
    rows = []
    for index, (names, members, one) in enumerate(zip(groups, loaded, found, strict=True)):
        label = names[0] if len(names) == 1 else f"ensemble of {len(members)}: {', '.join(names)}"
        speed = one.audio_seconds / max(one.seconds, 1e-9)
        rates = [_percent(rate[index]) for rate in shown.values()]
        rows.append([label, f"{one.num_parameters:,}", *rates, f"{speed:,.0f} ×"])
    first = found[0]
    print_table(["model", "parameters", *shown, "real time"], rows)
    print(f"{first.num_utterances:,} utterances, {first.audio_seconds:,.0f} s; in brackets 95 % intervals")


def _percent(rate: Rate | None) -> str:
    return "–" if rate is None else f"{rate.value:.1%} [{rate.low:.1%}, {rate.high:.1%}]"


def _summary(report: TrainReport, settings: TrainSettings, out: Path) -> None:
    from modicum.kv.budget import format_size

    result = report.result
    model = result.recognizer.model
    if report.targets is not None:
        stored = report.targets
        print(
            f"{stored.frames:,} targets of {stored.kept_classes:.1f} classes hold "
            f"{stored.captured_mass:.1%} of the probability, in {stored.nbytes_per_frame:.1f} bytes each "
            f"({stored.dense_nbytes_per_frame:,} for all logits)"
        )
    print(
        f"{report.num_utterances:,} utterances, {len(result.losses):,} steps in {result.seconds:.0f} s; loss "
        f"{result.losses[0]:.2f} at the first, {result.losses[-1]:.2f} at the last"
    )
    size = sum(path.stat().st_size for path in out.iterdir() if path.is_file())
    print(f"{settings.recipe.model.name}, {model.num_parameters:,} parameters, {format_size(size)}: {out}")
    complain(f"use it as --model {out}")


def _decoder(beam: int) -> Any:
    from modicum.speech.decoding import GreedyDecoder, PrefixBeamSearch

    if beam < 0:
        raise InputError(f"--beam is {beam}: give the number of prefixes, or 0 for greedy decoding")
    return PrefixBeamSearch(beam) if beam else GreedyDecoder()


def _transcribing(recognizer: Recognizer, is_embedded: bool, beam: int, words: Path | None) -> Any:
    """The decoder that the options of transcribe ask for."""
    from modicum.speech.compact.embedded import embedded_decoder
    from modicum.speech.compact.word_search import WordSearch, read_words

    if words is not None:
        return WordSearch.of(recognizer.tokens, read_words(words), beam or 16)
    return embedded_decoder() if is_embedded and not beam else _decoder(beam)


def _shown(path: Path) -> str:
    """The name, with � for what is not UTF-8 in it."""
    return str(path).encode(errors="surrogateescape").decode(errors="replace")


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise InputError(f"{option} is {text!r}: give numbers with commas between") from error


@contextmanager
def _settings_as_options() -> Iterator[None]:
    """Errors that name settings as Python does (learning_rate) name them as options (--rate)."""
    try:
        yield
    except ModicumError as error:
        text = _SETTING.sub(lambda found: _OPTIONS[found[1]], str(error))
        raise type(error)(text) from error
