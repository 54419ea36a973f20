"""Augmentation: features with masked bands, and audio at another speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.errors import InputError
from modicum.speech.audio import check_samples, resample
from modicum.speech.features import FeatureSettings

_STEPS = 1000
"""Speed factors are rounded to 1 / 1000, so that the two sample rates are whole."""


@dataclass(frozen=True)
class SpecAugmentSettings:
    """Settings of `SpecAugment`, with the names of the paper in brackets.

    The defaults are ours, for 40 mel channels and utterances of a few seconds.

    Attributes:
        num_frequency_masks: (m_F)
        max_frequency_mask: channels of a mask at most (F).
        num_time_masks: (m_T)
        max_time_mask: frames of a mask at most (T).
        max_time_share: of the utterance's frames in a mask at most (p).

    Raises:
        InputError: a number is out of range.
    """

    num_frequency_masks: int = 2
    max_frequency_mask: int = 8
    num_time_masks: int = 2
    max_time_mask: int = 30
    max_time_share: float = 0.1

    def __post_init__(self) -> None:
        for name in ("num_frequency_masks", "max_frequency_mask", "num_time_masks", "max_time_mask"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}: give 0 or more")
        if not 0 <= self.max_time_share <= 1:
            raise InputError(f"max_time_share is {self.max_time_share}: give a share from 0 to 1")


class SpecAugment:
    """Sets random bands of mel channels and of frames to 0, which is the mean of normalised features.

    Park et al. 2019 (arXiv 1904.08779), section 2, without time warping.
    """

    def __init__(self, settings: SpecAugmentSettings | None = None) -> None:
        self.settings = SpecAugmentSettings() if settings is None else settings

    def __call__(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """A masked copy of features [frames, mels].

        The width of each mask is drawn from 0 to the largest, then its start.
        """
        masked, settings = features.clone(), self.settings
        num_frames, num_mels = features.shape
        widest = min(settings.max_time_mask, int(settings.max_time_share * num_frames))
        for _ in range(settings.num_frequency_masks):
            start, stop = _band(num_mels, min(settings.max_frequency_mask, num_mels), generator)
            masked[:, start:stop] = 0
        for _ in range(settings.num_time_masks):
            start, stop = _band(num_frames, widest, generator)
            masked[start:stop] = 0
        return masked


def spec_augmented(features: Tensor, settings: FeatureSettings, generator: torch.Generator) -> Tensor:
    """A copy of features [frames, mels], masked by the utterance's mean: 0 if they are normalised."""
    if settings.normalization == "utterance":
        return SpecAugment()(features, generator)
    mean = features.mean(0)
    return SpecAugment()(features - mean, generator) + mean


class SpeedPerturbation:
    """Plays audio at a speed drawn from some factors; pitch changes with it.

    Ko et al. 2015, "Audio Augmentation for Speech Recognition", section 2, whose factors are the default.

    Args:
        factors: 1.1 is faster, and makes the audio shorter by the factor 1.1.

    Raises:
        InputError: there is no factor, or one is not within 0.5 to 2.
    """

    def __init__(self, factors: Sequence[float] = (0.9, 1.0, 1.1)) -> None:
        if not factors:
            raise InputError("there is no speed to draw: give at least one factor")
        for factor in factors:
            check_speed(factor)
        self.factors = tuple(factors)

    def __call__(self, samples: Tensor, generator: torch.Generator) -> Tensor:
        """Samples [n] float32 at a drawn speed."""
        return change_speed(samples, self.draw(generator))

    def draw(self, generator: torch.Generator) -> float:
        """A factor; times of phones are divided by it."""
        return self.factors[_integer(len(self.factors), generator)]


def change_speed(samples: Tensor, factor: float) -> Tensor:
    """Samples [n] played faster by a factor: [about n / factor] float32.

    Raises:
        InputError: the factor is not within 0.5 to 2, or the samples are of another shape.
    """
    check_speed(factor)
    check_samples(samples)
    return resample(samples, round(factor * _STEPS), _STEPS)


def check_speed(factor: float) -> None:
    """Raise unless it is a factor of a speed.

    Raises:
        InputError: it is not.
    """
    if not 0.5 <= factor <= 2:
        raise InputError(f"the speed is {factor:g}: give a factor from 0.5 to 2")


def _band(size: int, widest: int, generator: torch.Generator) -> tuple[int, int]:
    width = _integer(widest + 1, generator)
    start = _integer(size - width + 1, generator)
    return start, start + width


def _integer(stop: int, generator: torch.Generator) -> int:
    return int(torch.randint(stop, (), generator=generator))
