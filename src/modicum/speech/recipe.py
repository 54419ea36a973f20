"""Recipe: how a recognizer is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from modicum.distill.essence import Tail
from modicum.distill.training import TrainingSettings
from modicum.errors import InputError
from modicum.speech.acoustic_model import ModelSettings
from modicum.speech.conv_ctc import ConvCtcSettings

_MOST_SECONDS = 10_000_000
"""Of a batch: more than any corpus has."""


@dataclass(frozen=True)
class Recipe:
    """How a recognizer is trained: Adam, a linear warm-up and a cosine, clipped gradients.

    Attributes:
        model: its sizes.
        epochs: how often each utterance is seen; of several copies one in each epoch.
        batch_seconds: of audio in a step, with padding.
        learning_rate: the highest.
        warmup: share of the steps in which the rate rises.
        max_norm: gradients whose norm over all weights is larger are scaled to it.
        spec_augment: mask bands of features (see `SpecAugment`).
        hard_weight: λ, the weight of the correct labels beside a teacher's targets; without targets it is
            not used.
        tail: what becomes of probability that was not kept (see `modicum.distill.essence.Tail`).
        neighbours: of CTC targets: frames on each side of a frame that is not blank (see `CTCFrames`).
        save_every: steps between checkpoints.
        seed: of the weights, the order of utterances, and what is random in training.

    Raises:
        InputError: a value is out of range.
    """

    model: ModelSettings = field(default_factory=ConvCtcSettings)
    epochs: int = 20
    batch_seconds: float = 30.0
    learning_rate: float = 3e-3
    warmup: float = 0.1
    max_norm: float = 5.0
    spec_augment: bool = True
    hard_weight: float = 0.5
    tail: Tail = "renormalize"
    neighbours: int = 1
    save_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.batch_seconds <= _MOST_SECONDS:
            raise InputError(
                f"batch_seconds is {self.batch_seconds:g}: give seconds above 0 and at most {_MOST_SECONDS:,}"
            )
        if self.neighbours < 0:
            raise InputError(f"neighbours is {self.neighbours}: give 0 or more frames")
        self.schedule  # noqa: B018  # checks the rest

    @property
    def schedule(self) -> TrainingSettings:
        """The settings that it shares with `modicum.distill`; their batch is not used."""
        return TrainingSettings.of(self)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self) | {"model": self.model.to_dict()}
