"""Recipe: how an image network is trained."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from modicum.distill.training import TrainingSettings
from modicum.errors import InputError


@dataclass(frozen=True)
class ImageRecipe:
    """How an image network is trained: AdamW, a linear warm-up and a cosine, clipped gradients.

    Attributes:
        epochs: how often each image is seen.
        batch: images of a step.
        learning_rate: the highest.
        warmup: share of the steps in which the rate rises.
        weight_decay: of AdamW.
        max_norm: to which gradients are clipped.
        label_smoothing: share of the probability that goes to all classes.
        flip: mirror images left and right at random.
        shift: move images by up to so many pixels at random.
        distill_weight: share of the loss that is the divergence from a teacher, where there is one.
        temperature: that divides teacher's and student's logits.
        save_every: steps between checkpoints.
        seed: of weights, orders and augmentation.

    Raises:
        InputError: a value is out of range.
    """

    epochs: int = 20
    batch: int = 64
    learning_rate: float = 4e-3
    warmup: float = 0.1
    weight_decay: float = 0.02
    max_norm: float = 5.0
    label_smoothing: float = 0.1
    flip: bool = True
    shift: int = 4
    distill_weight: float = 0.7
    temperature: float = 2.0
    save_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        self.schedule  # noqa: B018  # checks what it shares
        for name in ("label_smoothing", "distill_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}: give a share from 0 to 1")
        if not 0 <= self.weight_decay < math.inf or not 0 < self.temperature < math.inf or self.shift < 0:
            raise InputError(f"{self}: give a weight decay and shift of 0 or more, a temperature above 0")
        if self.batch < 2:
            raise InputError(f"batch is {self.batch}: batch normalisation needs 2 or more")

    @property
    def schedule(self) -> TrainingSettings:
        """Steps, rates and orders, as `modicum.distill` has them."""
        return TrainingSettings.of(self)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)
