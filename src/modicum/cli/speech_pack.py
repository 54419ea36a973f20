"""`modicum speech pack` and `export`: recognizers in small files, and for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modicum.cli.console import complain, print_json, print_table, progress_bar
from modicum.cli.options import JsonOption

if TYPE_CHECKING:
    from modicum.speech.compact.packing import Trial

ModelArgument = Annotated[
    str, typer.Argument(help="A folder with a recognizer, or a packed file.", metavar="MODEL")
]


def pack(
    model: ModelArgument,
    budget: Annotated[
        str, typer.Option("--budget", "-b", help="Of the file, such as 500KB.", metavar="SIZE")
    ],
    data: Annotated[
        Path, typer.Option("--data", "-d", help="Audio with transcripts to learn from.", metavar="MANIFEST")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the file goes.", metavar="FILE")],
    test: Annotated[
        Path,
        typer.Option(
            help="Compare candidates on this: speech that neither MODEL nor they learned from.",
            metavar="MANIFEST",
        ),
    ],
    trials: Annotated[int, typer.Option(help="Candidates that are trained.")] = 4,
    epochs: Annotated[int, typer.Option(help="Of a candidate that begins from nothing.")] = 10,
    refine_epochs: Annotated[int, typer.Option(help="Of pruning and rounding, for each candidate.")] = 4,
    batch_seconds: Annotated[float, typer.Option(help="Seconds of audio in a step.")] = 30.0,
    spec_augment: Annotated[bool, typer.Option(help="Mask bands of the features in training.")] = True,
    seed: Annotated[int, typer.Option(help="Of weights, order and masks.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Fit a recognizer into a number of bytes: few bits, zeros, less width, shared layers.

    A few candidates are trained, with the model as their teacher, and the most accurate is written. Some
    begin with its weights, so what they are compared on must be new to it: --test is always needed. A run
    that is stopped goes on if it is started again; its trials are kept in FILE.trials.
    """
    from modicum.kv.budget import parse_size
    from modicum.speech.compact.packing import PackSettings
    from modicum.speech.compact.packing import pack as run
    from modicum.speech.compact.refining import RefiningRecipe
    from modicum.speech.recipe import Recipe
    from modicum.speech.recognizer import Recognizer

    training = Recipe(epochs=epochs, batch_seconds=batch_seconds, spec_augment=spec_augment, seed=seed)
    refining = Recipe(
        epochs=refine_epochs,
        batch_seconds=batch_seconds,
        learning_rate=1e-3,
        spec_augment=spec_augment,
        seed=seed,
    )
    settings = PackSettings(parse_size(budget), trials, training, RefiningRecipe(refining))
    with progress_bar() as progress:
        found = run(Recognizer.load(model), data, out, settings, test=test, progress=progress)
    if as_json:
        print_json([one.to_dict() for one in found])
        return
    print_table(["candidate", "bytes", "errors"], [_row(one) for one in found])
    print(f"{found[0].candidate.label}, {out.stat().st_size:,} bytes: {out}")
    complain(f"use it as --model {out}")


def export(
    model: ModelArgument,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Gets model.onnx and tokens.txt.", metavar="FOLDER")
    ],
    as_json: JsonOption = False,
) -> None:
    """Write a CTC recognizer as ONNX, for onnxruntime and sherpa-onnx."""
    from modicum.speech.compact.onnx_export import export_onnx
    from modicum.speech.recognizer import Recognizer

    recognizer = Recognizer.load(model)
    files = export_onnx(recognizer, out)
    nbytes = files.model.stat().st_size
    if as_json:
        print_json({"model": str(files.model), "nbytes": nbytes, "sherpa_onnx": files.is_for_sherpa})
        return
    print(f"{nbytes:,} bytes: {files.model}")
    if files.is_for_sherpa:
        complain(f"sherpa-onnx loads it by from_zipformer_ctc(feature_dim={recognizer.features.num_mels})")
    else:
        complain(
            "sherpa-onnx computes other features (mel filters up to 7,600 Hz at 16 kHz): for it, train "
            "with --streamable"
        )


def _row(trial: Trial) -> list[str]:
    rate = trial.error_rate
    return [trial.candidate.label, f"{trial.nbytes:,}", f"{rate.value:.1%} [{rate.low:.1%}, {rate.high:.1%}]"]
