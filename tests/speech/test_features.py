"""Features: Kaldi's filter bank, compared with its formulas in float64; framing and normalisation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.errors import InputError
from modicum.speech.features import Fbank, FeatureSettings
from tests.bounds import FUNCTION, LAMBDA, assert_within, gamma, sum_bound, unit_roundoff

pytest.importorskip("kaldi_native_fbank")


def noise(num_samples, seed=0, scale=0.1):
    return torch.randn(num_samples, generator=torch.Generator().manual_seed(seed)) * scale


def mel(frequency):
    return 1127 * math.log(1 + frequency / 700)


def mirrored(index, length):
    while not 0 <= index < length:
        index = -index - 1 if index < 0 else 2 * length - 1 - index
    return index


def reference(samples, options):
    """Log mel energies [T, F] of samples, and the bound of their error in float32, by Kaldi's formulas."""
    x = samples.double().tolist()
    rate, length, shift = options.sample_rate, options.frame_length, options.frame_shift
    size = 2 ** math.ceil(math.log2(length))
    low, high = mel(20), mel(rate / 2)
    step = (high - low) / (options.num_mels + 1)
    weights = np.zeros((options.num_mels, size // 2 + 1))
    for m in range(options.num_mels):
        left, centre, right = (low + (m + i) * step for i in range(3))
        for k in range(size // 2):
            at = mel(k * rate / size)
            if left < at < right:
                weights[m, k] = (at - left) / step if at <= centre else (right - at) / step
    rows, bounds = [], []
    for t in range((len(x) + shift // 2) // shift):
        first = t * shift + shift // 2 - length // 2
        frame = [x[mirrored(first + i, len(x))] for i in range(length)]
        mean = sum(frame) / length
        frame = [value - mean for value in frame]
        frame = [frame[i] - 0.97 * frame[max(0, i - 1)] for i in range(length)]
        frame = [
            value * (0.5 - 0.5 * math.cos(2 * math.pi * i / (length - 1))) ** 0.85
            for i, value in enumerate(frame)
        ]
        spectrum = np.fft.rfft(frame, size)
        energies = weights @ np.abs(spectrum) ** 2
        rows.append(np.log(np.maximum(energies, np.finfo(np.float32).eps)))
        # A component of a fast Fourier transform is off by √log2(n)·u of the norm of its input, with as many
        # roundings before it: the mean, pre-emphasis and window (Higham and Mary 2019: λ times the root mean
        # square). A filter's weight is off by what rounded mel frequencies make of it, also just outside.
        norm = math.sqrt(sum(value**2 for value in frame))
        chain = LAMBDA * unit_roundoff(torch.float32) * (math.sqrt(math.log2(size)) + math.sqrt(length))
        off = chain * norm
        amplitude = np.abs(spectrum)
        slope = gamma(2 * FUNCTION, torch.float32) * high / step
        reach = (weights > 0) | np.roll(weights > 0, 1, 1) | np.roll(weights > 0, -1, 1)
        error = weights @ (2 * amplitude * off + off**2) + slope * (reach @ amplitude**2)
        error = error + sum_bound(size, torch.float32, energies)
        share = error / energies
        assert share.max() < 0.5, "the bound says nothing"
        bounds.append(-np.log1p(-share) + gamma(FUNCTION, torch.float32) * np.abs(rows[-1]))
    return torch.tensor(np.array(rows)), torch.tensor(np.array(bounds))


@pytest.mark.parametrize("options", [(16_000, 40, 25, 10), (16_000, 80, 25, 10), (8000, 24, 20, 10)])
def test_energies_are_kaldis(options):
    chosen = FeatureSettings(*options, normalization="none")
    samples = noise(chosen.sample_rate // 8)
    found = Fbank(chosen)(samples)
    expected, bound = reference(samples, chosen)
    assert found.dtype == torch.float32
    assert_within(found, expected, bound, "a log energy")


@settings(max_examples=60)
@given(num_samples=st.integers(80, 3000), shift=st.sampled_from([5.0, 10.0, 12.5]))
def test_the_number_of_frames_is_samples_by_shift_rounded(num_samples, shift):
    fbank = Fbank(FeatureSettings(frame_shift_ms=shift))
    per_frame = fbank.settings.frame_shift
    expected = int(num_samples / per_frame + 0.5)
    assert fbank.num_frames(num_samples) == expected
    if expected:
        assert fbank(noise(num_samples)).shape == (expected, 40)


def test_each_channel_has_mean_0_and_variance_1():
    found = Fbank(FeatureSettings())(noise(16_000)).double()
    # Float32 values of at most `largest`, each rounded once.
    largest = float(found.abs().max())
    assert_within(found.mean(0), torch.zeros(40), largest * 2**-24, "a mean")
    assert_within(found.square().mean(0), torch.ones(40), 2 * largest**2 * 2**-24 + 1e-12, "a variance")


def test_volume_changes_nothing_but_rounding():
    fbank = Fbank(FeatureSettings())
    samples = noise(8000, scale=0.3)
    # A power of two scales every number on the way exactly, so that only the logarithm rounds anew; the
    # normalisation divides by a deviation of about 0.3 to 1.
    raw = Fbank(FeatureSettings(normalization="none"))(samples)
    bound = 4 * gamma(FUNCTION, torch.float32) * float(raw.abs().max()) / float(raw.double().std(0).min())
    assert_within(fbank(samples / 4), fbank(samples), bound * (1 + float(fbank(samples).abs().max())))


def test_silence_gives_zeros():
    assert torch.equal(Fbank(FeatureSettings())(torch.zeros(1600)), torch.zeros(10, 40))


def test_the_same_samples_give_the_same_features():
    fbank = Fbank(FeatureSettings())
    assert torch.equal(fbank(noise(4000)), fbank(noise(4000)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_mels": 2}, "num_mels is 2: give 4 to 128"),
        ({"sample_rate": 10}, "sample rate is 10 Hz"),
        ({"frame_shift_ms": 30.0}, "shift of at least 1 ms and at most the length"),
        ({"dither": -1.0}, "dither is -1"),
        ({"normalization": "global"}, "normalization is 'global': choose one of utterance, none"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        FeatureSettings(**fields)


def test_bad_samples_are_refused():
    fbank = Fbank(FeatureSettings())
    with pytest.raises(InputError, match="60 samples make no frame of 160"):
        fbank(noise(60))
    with pytest.raises(InputError, match="of shape"):
        fbank(torch.zeros(0))
    with pytest.raises(InputError, match="inf or nan"):
        fbank(torch.tensor([0.0, math.inf] * 100))
