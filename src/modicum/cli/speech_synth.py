"""`modicum speech synth`: synthetic speech to train and test with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modicum.cli.console import complain, print_json, progress_bar
from modicum.cli.options import JsonOption
from modicum.errors import InputError


def synth(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Gets train and test, each with a manifest.", metavar="FOLDER")
    ],
    hours: Annotated[float, typer.Option(help="Of speech to train with.")] = 1.0,
    test_hours: Annotated[float, typer.Option(help="Of speech by held-out voices; 0 for none.")] = 0.1,
    voices: Annotated[
        int | None,
        typer.Option(help="To train with; by default all that are not held out.", show_default=False),
    ] = None,
    held_out_voices: Annotated[int, typer.Option(help="To test with; 0 for none.")] = 8,
    domains: Annotated[
        str, typer.Option(help="Of the sentences, with commas between.")
    ] = "digits,commands,statements",
    noise: Annotated[
        str, typer.Option(help="Add noise at a ratio in dB between these, such as 0,20.", show_default=False)
    ] = "",
    audio_format: Annotated[str, typer.Option("--format", help="Of the files: flac or wav.")] = "flac",
    seed: Annotated[int, typer.Option(help="Of sentences, voices and noise.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Make speech by espeak-ng, with the time of every phone, in many voices and accents.

    The voices of the test are not among those of the training. The same command makes the same files. A run
    that is stopped goes on if it is started again.
    """
    from modicum.speech.synthesis import SynthesisSettings, synthesize

    settings = SynthesisSettings(
        hours=hours,
        test_hours=test_hours,
        num_voices=voices,
        held_out_voices=held_out_voices,
        domains=tuple(name.strip() for name in domains.split(",") if name.strip()),
        noise_snr=_ratios(noise),
        suffix=f".{audio_format}",
        seed=seed,
    )
    with progress_bar() as progress:
        reports = synthesize(out, settings, progress)
    if as_json:
        print_json({name: report.to_dict() for name, report in reports.items()})
        return
    for name, report in reports.items():
        print(
            f"{name}: {report.num_utterances:,} utterances, {report.seconds / 60:.1f} minutes, "
            f"{len(report.voices)} voices: {report.manifest}"
        )
    complain(f"train with it: modicum speech train {out / 'train'} --out MODEL")


def _ratios(text: str) -> tuple[float, float] | None:
    if not text:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(
            f"noise is {text!r}: give the lowest and the highest ratio in dB, as in 0,20"
        ) from error
    return low, high
