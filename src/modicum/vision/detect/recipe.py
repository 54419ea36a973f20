"""Recipe: how a detector is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from modicum.distill.training import TrainingSettings, generator
from modicum.vision.detect.augment import AugmentSettings


@dataclass(frozen=True)
class Recipe:
    """How a detector is trained: Adam, a linear warm-up and a cosine, clipped gradients.

    Attributes:
        epochs: how often each image is seen.
        batch: images of a step.
        learning_rate: the highest. The default suits ResNets; `mobilenet` learns faster at four times as much
            (docs/detect.md has measurements).
        warmup: share of the steps in which the rate rises.
        max_norm: gradients whose norm over all weights is larger are scaled to it.
        augment: what is random in images.
        save_every: steps between checkpoints.
        seed: of weights, order and augmentation.

    Raises:
        InputError: a value is out of range.
    """

    epochs: int = 40
    batch: int = 8
    learning_rate: float = 8e-3
    warmup: float = 0.05
    max_norm: float = 10.0
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    save_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        self.schedule  # noqa: B018  # checks what it shares

    @property
    def schedule(self) -> TrainingSettings:
        """Steps, rates and orders, as `modicum.distill` has them."""
        return TrainingSettings.of(self)

    def step_generator(self, step: int) -> torch.Generator:
        """What is random in a step depends on its number only, so that a resumed run repeats it."""
        return generator(self.seed, -1 - step)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)
