"""Recipe: how a detector is trained."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from modicum.errors import InputError
from modicum.vision.detect.augment import AugmentSettings

_SEED = 1_000_003
_MOST_SEEDS = 2**63
"""What torch's generators take."""


@dataclass(frozen=True)
class Recipe:
    """How a detector is trained: Adam, a linear warm-up and a cosine, clipped gradients.

    Attributes:
        epochs: how often each image is seen.
        batch: images of a step.
        learning_rate: the highest.
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
    learning_rate: float = 2e-3
    warmup: float = 0.05
    max_norm: float = 10.0
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    save_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give 1 or more")
        for name in ("learning_rate", "max_norm"):
            if not 0 < getattr(self, name) < 1e30:
                raise InputError(f"{name} is {getattr(self, name)}: give a number above 0")
        if not 0 <= self.seed < _MOST_SEEDS:
            raise InputError(f"seed is {self.seed}: give a whole number from 0 to {_MOST_SEEDS - 1:,}")
        if not 0 <= self.warmup <= 1:
            raise InputError(f"warmup is {self.warmup}: give a share from 0 to 1")

    def num_steps(self, num_images: int) -> int:
        """Steps in all; an epoch's last batch may be smaller."""
        return self.epochs * math.ceil(num_images / self.batch)

    def rate(self, step: int, num_steps: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising = max(1, round(self.warmup * num_steps))
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        return self.learning_rate * (1 + math.cos(math.pi * (step - rising) / max(1, num_steps - rising))) / 2

    def rows(self, step: int, num_images: int) -> Tensor:
        """The images of a step: each epoch has them in an order of its own."""
        epoch, number = divmod(step, math.ceil(num_images / self.batch))
        generator = torch.Generator().manual_seed((self.seed * _SEED + epoch) % 2**63)
        order = torch.randperm(num_images, generator=generator)
        return order[number * self.batch : (number + 1) * self.batch]

    def generator(self, step: int) -> torch.Generator:
        """What is random in a step depends on its number only, so that a resumed run repeats it."""
        return torch.Generator().manual_seed((self.seed * _SEED - 1 - step) % 2**63)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)
