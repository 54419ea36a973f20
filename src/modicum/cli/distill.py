"""`modicum distill`: a student that learns from what its teachers hold probable."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modicum.cli.console import complain, print_json, progress_bar, quiet, settings_as_options
from modicum.cli.options import DeviceOption, JsonOption
from modicum.errors import InputError

if TYPE_CHECKING:
    from modicum.distill.entry import DistillReport

_SETTINGS = (
    "keep",
    "tail",
    "bits",
    "temperature",
    "sequences",
    "length",
    "hard_weight",
    "answer_weight",
    "epochs",
    "batch",
)


def distill(
    teacher: Annotated[
        str,
        typer.Option(
            help="Models, as for modicum run, with commas between; of several the mean.", metavar="NAMES"
        ),
    ],
    student: Annotated[
        str, typer.Option(help="The model that learns: a folder, packed or dense.", metavar="FOLDER")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where the trained student goes.", metavar="FOLDER")
    ],
    text: Annotated[
        Path | None,
        typer.Option(help="Text to learn from: a file or a folder of .txt files; else the sample text."),
    ] = None,
    keep: Annotated[
        str, typer.Option(help="Classes kept of each token: topk=16, threshold=0.01 or mass=0.95.")
    ] = "topk=16",
    tail: Annotated[
        str, typer.Option(help="Probability not kept: one bin for it, drop, or renormalize.")
    ] = "bin",
    bits: Annotated[int, typer.Option(help="Of a recorded probability: 8 or 16.")] = 16,
    hard_weight: Annotated[float, typer.Option(help="Weight of the text's own tokens, 0 to 1.")] = 0.25,
    answer_weight: Annotated[
        float, typer.Option(help="With --tasks: weight of an answer's loss beside that of its sequence.")
    ] = 1.0,
    temperature: Annotated[float, typer.Option(help="Divides teacher's and student's logits.")] = 1.0,
    epochs: Annotated[int, typer.Option(help="How often each sequence is learned from.")] = 1,
    batch: Annotated[int, typer.Option(help="Sequences of a step.")] = 8,
    rate: Annotated[float, typer.Option(help="The highest learning rate.")] = 1e-4,
    sequences: Annotated[
        int | None, typer.Option(help="To learn from; by default all that the text has.", show_default=False)
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of each; by default 512 at most.", show_default=False)
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="Generated questions to mix in, such as niah_single_2,vt.", show_default=False)
    ] = "",
    task_share: Annotated[float, typer.Option(help="Share of sequences that are questions.")] = 0.5,
    targets: Annotated[
        Path | None,
        typer.Option(help="Record the teachers' targets here and keep them.", metavar="FOLDER"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of sequences and their order.")] = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train a small or pruned model on the most probable tokens of a teacher, recorded once.

    A pruned student keeps exactly the weights that it has, in the format that it came in. Perplexity is of
    text that was held back. A run that is stopped goes on if it is started again with the same --out.
    """
    from modicum.distill.essence import check_tail

    with settings_as_options(*_SETTINGS):
        checked_tail = check_tail(tail)
    quiet()
    from modicum.distill.entry import DistillSettings
    from modicum.distill.entry import distill as run
    from modicum.distill.training import TrainingSettings
    from modicum.texts import sample_text
    from modicum.weights.calibration import texts_in

    with settings_as_options(*_SETTINGS):
        training = TrainingSettings(
            epochs=epochs,
            batch=batch,
            learning_rate=rate,
            hard_weight=hard_weight,
            tail=checked_tail,
            answer_weight=answer_weight,
            seed=seed,
        )
        settings = DistillSettings(
            keep, bits, temperature, sequences, length, tasks, task_share, seed, targets, device, training
        )
        teachers = [name for name in teacher.split(",") if name]
        if text is not None and not text.exists():
            raise InputError(
                f"there is no {text} to learn from: give a text file, or a folder of *.txt files"
            )
        texts = [sample_text()] if text is None else texts_in(text)
        with progress_bar() as progress:
            report = run(student, teachers, texts, out, settings, progress=progress)
    if as_json:
        print_json(report.to_dict())
        return
    _summary(report, out)


def _summary(report: DistillReport, out: Path) -> None:
    from modicum.kv.budget import format_size

    stored = report.targets
    print(
        f"{stored.frames:,} targets of {stored.kept_classes:.1f} tokens hold "
        f"{stored.captured_mass:.1%} of the probability, in {stored.nbytes_per_frame:.1f} bytes each "
        f"({stored.dense_nbytes_per_frame:,} for all logits)"
    )
    print(
        f"{len(report.losses):,} steps in {report.seconds:.0f} s; perplexity of held-back text "
        f"{report.perplexity_before:.2f} before, {report.perplexity_after:.2f} after; {report.sparsity:.1%} "
        "of pruned layers' weights removed, as before"
    )
    print(f"{format_size(report.file_bytes)} {report.format}: {out}")
    complain(f"use it as --model {out}")
