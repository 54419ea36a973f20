"""What a search for an image network found: numbers, and a picture of the front."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modicum.whole_file import whole_file


@dataclass(frozen=True)
class FoundNetwork:
    """A network of the front.

    Attributes:
        variants: the name of each block's variant.
        milliseconds: from the table of block times; None if the table does not have its blocks.
        parameters: how many it has.
        macs: multiply-accumulates for one image.
        predicted: accuracy on the validation images that the predictor gives it.
        validation: measured after finetuning; None if it was not finetuned.
        test: likewise, on the test images.
        folder: where it was saved, below the search's; None if it was not.
    """

    variants: tuple[str, ...]
    milliseconds: float | None
    parameters: int
    macs: int
    predicted: float
    validation: float | None = None
    test: float | None = None
    folder: str | None = None


@dataclass(frozen=True)
class SearchReport:
    """What a search found.

    Attributes:
        classes: names.
        images: how many to learn from, to compare with, and to test on.
        unreadable: names of files that were left out, with the reason.
        device: whose block times were used.
        runtime: that ran the blocks.
        num_networks: of the space.
        reference: the reference network itself.
        failed_variants: names "block/variant" whose training failed.
        kendall_tau: of the predictor, each sample left out once.
        kendall_tau_sum: of minus the sum of block errors, nothing fitted.
        kendall_tau_assembled: of the accuracy before finetuning.
        kendall_tau_parameters: of the number of parameters.
        error: of the predictor, root mean square, each sample left out once.
        samples: accuracy by the names of a sample's variants, and its milliseconds.
        front: by rising time.
        seconds: of each step of this run; those that were cached take next to nothing.
    """

    classes: tuple[str, ...]
    images: tuple[int, int, int]
    unreadable: dict[str, str]
    device: str
    runtime: str
    num_networks: int
    reference: FoundNetwork
    failed_variants: tuple[str, ...]
    kendall_tau: float
    kendall_tau_sum: float
    kendall_tau_assembled: float
    kendall_tau_parameters: float
    error: float
    samples: tuple[tuple[float, float], ...] = field(repr=False)
    """Milliseconds and validation accuracy of each sample."""
    front: tuple[FoundNetwork, ...] = field(repr=False)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        told: dict[str, Any] = asdict(self)
        # JSON has no NaN.
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in told.items()}


def draw_front(report: SearchReport, path: Path) -> None:
    """Draw accuracy against time: samples, predicted front, finetuned networks, the reference.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if report.samples:
        times, scores = zip(*report.samples, strict=True)
        axes.plot(times, [100 * s for s in scores], "o", color="0.65", ms=4, label="samples")
    axes.plot(
        [one.milliseconds or 0.0 for one in report.front],
        [100 * one.predicted for one in report.front],
        "-",
        color="C0",
        marker=".",
        label="front, predicted",
    )
    tuned = [one for one in report.front if one.validation is not None]
    axes.plot(
        [one.milliseconds or 0.0 for one in tuned],
        [100 * (one.validation or 0.0) for one in tuned],
        "*",
        color="C3",
        ms=11,
        label="front, finetuned",
    )
    if report.reference.validation is not None and report.reference.milliseconds is not None:
        axes.plot(
            [report.reference.milliseconds],
            [100 * report.reference.validation],
            "s",
            color="C2",
            label="reference",
        )
    axes.set_xlabel(f"milliseconds ({report.runtime})")
    axes.set_ylabel("accuracy on validation images, %")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        figure.savefig(part, dpi=130, format="png")
