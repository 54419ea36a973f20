"""Features that need no whole utterance: their filters, and masks of SpecAugment."""

from __future__ import annotations

import pytest
import torch

from modicum.errors import InputError
from modicum.speech import Fbank, FeatureSettings
from modicum.speech.augment import SpecAugment, spec_augmented


def test_masks_of_unnormalised_features_have_the_mean_of_the_utterance() -> None:
    settings = FeatureSettings(normalization="none")
    features = 3 * torch.randn(50, 40) - 8
    masked = spec_augmented(features, settings, torch.Generator().manual_seed(3))
    centred = SpecAugment()(features - features.mean(0), torch.Generator().manual_seed(3))
    is_masked = centred == 0
    assert is_masked.any()
    mean = features.mean(0).expand_as(features)
    assert torch.equal(masked[is_masked], mean[is_masked])
    # Subtracting and adding the mean rounds each number twice.
    error = (masked - features)[~is_masked].abs()
    assert float(error.max()) <= 4 * 2**-24 * float(features.abs().max())


def test_masks_of_normalised_features_are_zero() -> None:
    features = torch.randn(50, 40)
    masked = spec_augmented(features, FeatureSettings(), torch.Generator().manual_seed(3))
    assert torch.equal(masked, SpecAugment()(features, torch.Generator().manual_seed(3)))


def test_filters_end_at_the_highest_frequency() -> None:
    """A tone of 7,800 Hz is within filters up to 8,000 Hz and outside those up to 7,600."""
    tone = 0.5 * torch.sin(2 * torch.pi * 7800 * torch.arange(16_000) / 16_000)
    last = {}
    for high in (0.0, -400.0, 7600.0):
        settings = FeatureSettings(normalization="none", high_frequency=high)
        assert settings.highest_frequency == (8000 if high == 0 else 7600)
        last[high] = float(Fbank(settings)(tone)[10:-10, -1].mean())
    assert last[-400.0] == last[7600.0]
    assert last[0.0] > last[-400.0] + 3


@pytest.mark.parametrize("high", [100.0, -7000.0, 9000.0])
def test_filters_that_end_nowhere_are_refused(high: float) -> None:
    with pytest.raises(InputError, match="give 4000 to 8000"):
        FeatureSettings(high_frequency=high)
