"""Augmentation: what is masked, how fast it is, and that noise has the ratio that was asked for."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import InputError
from modicum.speech.audio import save_audio
from modicum.speech.augment import SpecAugment, SpecAugmentSettings, SpeedPerturbation, change_speed
from modicum.speech.noise import AddNoise, NoiseSettings, add_noise, autoregressive
from tests.bounds import assert_within, gamma


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def bands(is_masked):
    """The number of runs of True."""
    padded = [False, *is_masked.tolist(), False]
    return sum(b and not a for a, b in pairwise(padded))


@given(
    st.integers(1, 60),
    st.integers(4, 20),
    st.integers(0, 3),
    st.integers(0, 30),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_masks_are_bands_within_their_bounds(num_frames, num_mels, num_masks, widest, share, seed):
    settings = SpecAugmentSettings(num_masks, widest, num_masks, widest, share)
    features = torch.ones(num_frames, num_mels)
    found = SpecAugment(settings)(features, seeded(seed))
    assert bool(((found == 0) | (found == 1)).all())
    assert bool((features == 1).all()), "the input is changed"
    frames, mels = (found == 0).all(1), (found == 0).all(0)
    if not bool(frames.all()):
        # All that is masked is whole frames and whole channels.
        assert torch.equal(found == 0, frames[:, None] | mels[None])
        assert bands(frames) <= num_masks
        assert int(frames.sum()) <= num_masks * min(widest, int(share * num_frames)) or bool(mels.all())
        assert int(mels.sum()) <= num_masks * min(widest, num_mels)
        assert bands(mels) <= num_masks


def test_masks_are_drawn_from_all_widths_and_places():
    settings = SpecAugmentSettings(1, 3, 0, 0)
    seen = set()
    augment, generator = SpecAugment(settings), seeded()
    for _ in range(400):
        masked = (augment(torch.ones(2, 5), generator)[0] == 0).nonzero().flatten().tolist()
        seen.add((masked[0], len(masked)) if masked else (0, 0))
    assert seen == {(0, 0)} | {(start, width) for width in (1, 2, 3) for start in range(6 - width)}


def test_the_same_generator_gives_the_same_masks():
    features = torch.randn(100, 40, generator=seeded())
    first, second, other = (SpecAugment()(features, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("factor", [0.9, 1.1, 1.25])
def test_speed_changes_length_and_pitch(factor):
    pytest.importorskip("soxr")
    rate, frequency = 16_000, 500.0
    time = torch.arange(rate, dtype=torch.float64) / rate
    found = change_speed((2 * math.pi * frequency * time).sin().float(), factor).double()
    assert abs(len(found) - rate / factor) <= 1
    middle = slice(len(found) // 4, 3 * len(found) // 4)
    phase = 2 * math.pi * frequency * factor * torch.arange(len(found), dtype=torch.float64)[middle] / rate
    basis = torch.stack([phase.sin(), phase.cos()], 1)
    fit = torch.linalg.lstsq(basis, found[middle, None]).solution
    # As in test_audio: 20 bits.
    assert float((found[middle] - (basis @ fit)[:, 0]).square().mean().sqrt()) <= 2**-20


def test_speeds_are_drawn_from_the_factors():
    pytest.importorskip("soxr")
    perturb, generator = SpeedPerturbation((0.5, 1.0, 2.0)), seeded()
    lengths = {len(perturb(torch.ones(1000), generator)) for _ in range(40)}
    assert lengths == {500, 1000, 2000}
    assert torch.equal(change_speed(torch.ones(10), 1.0), torch.ones(10))


def ratio(samples, noisy):
    noise = noisy.double() - samples.double()
    return float(samples.double().square().sum() / noise.square().sum())


@given(st.floats(-20, 40), st.integers(0, 99), st.sampled_from(["white", "coloured"]))
def test_noise_has_exactly_the_ratio(snr, seed, kind):
    samples = 0.1 * torch.randn(2000, generator=seeded(seed))
    noisy = AddNoise(NoiseSettings((snr, snr), kind))(samples, seeded(seed + 1))
    # The sum is rounded once to float32: each sample by u of its size, which is an error of the noise's norm
    # of at most u·‖noisy‖, and twice its share in the ratio.
    noise_norm = float((noisy.double() - samples.double()).norm())
    share = gamma(1, torch.float32) * float(noisy.double().norm()) / noise_norm
    expected = 10 ** (snr / 10)
    assert ratio(samples, noisy) == pytest.approx(expected, rel=2 * share / (1 - share) ** 2 + 1e-12)


def test_ratios_are_drawn_between_the_bounds():
    samples = torch.randn(500, generator=seeded())
    augment, generator = AddNoise(NoiseSettings((5, 15))), seeded(3)
    found = [10 * math.log10(ratio(samples, augment(samples, generator))) for _ in range(50)]
    assert 5 - 1e-3 <= min(found) < 6
    assert 14 < max(found) <= 15 + 1e-3


def test_silence_stays_silent_and_zero_noise_adds_nothing():
    assert not AddNoise()(torch.zeros(100), seeded()).any()
    samples = torch.randn(100, generator=seeded())
    assert torch.equal(add_noise(samples, torch.zeros(100), 10.0), samples)


@given(st.integers(1, 300), st.floats(0, 0.99), st.integers(0, 99))
def test_the_coloured_noise_is_ar_1(num_samples, coefficient, seed):
    white = torch.randn(num_samples, generator=seeded(seed), dtype=torch.float64)
    expected = [float(white[0]) / math.sqrt(1 - coefficient**2)]
    for value in white[1:].tolist():
        expected.append(coefficient * expected[-1] + value)
    # Both sums have at most n terms of the same sizes.
    size = max(1.0, float(white.abs().max())) * num_samples / math.sqrt(1 - coefficient**2)
    bound = 2 * gamma(2 * num_samples + 16, torch.float64) * size
    assert_within(autoregressive(white, coefficient), torch.tensor(expected, dtype=torch.float64), bound)


def test_noise_from_a_folder_is_repeated_and_mixed(tmp_path):
    pytest.importorskip("soundfile")
    hum = 0.5 * torch.sin(torch.arange(50) * 0.3)
    save_audio(tmp_path / "hum.wav", hum, 16_000)
    samples = 0.1 * torch.randn(170, generator=seeded())
    settings = NoiseSettings((10, 10), "folder", folder=tmp_path)
    noise = AddNoise(settings)(samples, seeded()).double() - samples.double()
    assert ratio(samples, samples + noise) == pytest.approx(10, rel=1e-3)
    # Sums of float32 samples, at most 1 each.
    assert_within(noise[50:100], noise[:50], 4 * 2**-24, "the repeated recording")
    save_audio(tmp_path / "hum.wav", torch.zeros(9), 16_000)
    with pytest.raises(InputError, match=r"hum.wav is silent"):
        AddNoise(settings)(samples, seeded())


def test_bad_settings_are_refused(tmp_path):
    for make, message in (
        (lambda: SpecAugmentSettings(num_time_masks=-1), "num_time_masks is -1"),
        (lambda: SpecAugmentSettings(max_time_share=2.0), "max_time_share is 2.0"),
        (lambda: SpeedPerturbation(()), "no speed to draw"),
        (lambda: SpeedPerturbation((3.0,)), "the speed is 3"),
        (lambda: NoiseSettings((20, 0)), "the lower one first"),
        (lambda: NoiseSettings(kind="pink"), "choose one of white, coloured, folder"),
        (lambda: NoiseSettings(coefficient=1.0), "coefficient of AR"),
        (lambda: NoiseSettings(kind="folder"), "give both"),
        (lambda: AddNoise(NoiseSettings(kind="folder", folder=tmp_path)), "has no audio"),
        (lambda: add_noise(torch.ones(3), torch.ones(2), 0.0), "give as many"),
        (lambda: AddNoise()(torch.ones(2, 2), seeded()), "of shape"),
    ):
        with pytest.raises(InputError, match=message):
            make()
