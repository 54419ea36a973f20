"""Audio: what is read is what was written; resampling keeps a tone; bad files are named."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.errors import InputError
from modicum.speech.audio import audio_info, is_silent, load_audio, resample, save_audio

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

STEP = 2**-15
"""Of a 16-bit sample."""


def noise(num_samples, seed=0):
    return torch.rand(num_samples, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_a_file_comes_back_to_half_a_step(tmp_path, suffix):
    samples = noise(1000) * (1 - STEP)  # the largest step is one below 1
    save_audio(tmp_path / f"a{suffix}", samples, 16_000)
    found = load_audio(tmp_path / f"a{suffix}")
    assert found.dtype == torch.float32
    assert float((found - samples).abs().max()) <= STEP / 2
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]


def test_samples_beyond_1_are_clipped(tmp_path):
    save_audio(tmp_path / "a.wav", torch.tensor([3.0, -3.0, 0.0]), 16_000)
    assert load_audio(tmp_path / "a.wav").abs().tolist() == pytest.approx([1, 1, 0], abs=STEP)


def test_channels_are_averaged(tmp_path):
    left, right = noise(500, 1).numpy(), noise(500, 2).numpy()
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 16_000, subtype="FLOAT")
    expected = (left.astype(np.float64) + right) / 2
    # One rounding to float32 of a number of at most 1.
    assert np.abs(load_audio(tmp_path / "a.wav").double().numpy() - expected).max() <= 2**-24
    assert audio_info(tmp_path / "a.wav").num_channels == 2
    assert audio_info(tmp_path / "a.wav").duration == 500 / 16_000


@settings(max_examples=25)
@given(
    frequency=st.floats(100, 2400), rates=st.sampled_from([(8000, 16_000), (22_050, 16_000), (44_100, 8000)])
)
def test_resampling_keeps_a_tone(frequency, rates):
    rate, wanted = rates
    time = torch.arange(rate, dtype=torch.float64) / rate
    found = resample((2 * math.pi * frequency * time).sin().float(), rate, wanted).double()
    assert len(found) == wanted
    # The same tone, of any phase and size, is fitted away from the ends, where the filter sees none of it.
    middle = slice(wanted // 4, 3 * wanted // 4)
    phase = 2 * math.pi * frequency * torch.arange(wanted, dtype=torch.float64)[middle] / wanted
    basis = torch.stack([phase.sin(), phase.cos()], 1)
    fit = torch.linalg.lstsq(basis, found[middle, None]).solution
    rest = found[middle] - (basis @ fit)[:, 0]
    # soxr's quality "HQ" keeps 20 bits; its passband is flat to 0.01 dB (SOXR_ROLLOFF_SMALL).
    assert float(rest.square().mean().sqrt()) <= 2**-20
    assert fit.flatten().tolist() == pytest.approx([1, 0], abs=10 ** (0.01 / 20) - 1)


def test_another_rate_is_resampled_with_a_warning(tmp_path):
    save_audio(tmp_path / "a.wav", noise(800), 8000)
    with pytest.warns(UserWarning, match="8,000 Hz is resampled to 16,000 Hz"):
        assert len(load_audio(tmp_path / "a.wav")) == 1600
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_audio(tmp_path / "a.wav", 8000)) == 800


def test_bad_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"there is no audio file .*a.wav"):
        load_audio(tmp_path / "a.wav")
    (tmp_path / "text.wav").write_text("no audio", encoding="utf-8")
    with pytest.raises(InputError, match=r"text.wav cannot be read as audio"):
        load_audio(tmp_path / "text.wav")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 16_000)
    with pytest.raises(InputError, match=r"empty.wav has no samples"):
        load_audio(tmp_path / "empty.wav")
    soundfile.write(tmp_path / "nan.wav", np.array([0, 0, np.nan], np.float32), 16_000, subtype="FLOAT")
    with pytest.raises(InputError, match=r"sample 2 of .*nan.wav is not a number"):
        load_audio(tmp_path / "nan.wav")


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match=r"suffix '\.xyz'"):
        save_audio(tmp_path / "a.xyz", noise(10), 16_000)
    with pytest.raises(InputError, match="inf or nan"):
        save_audio(tmp_path / "a.wav", torch.tensor([math.nan]), 16_000)
    with pytest.raises(InputError, match="of shape"):
        save_audio(tmp_path / "a.wav", torch.zeros(2, 3), 16_000)
    with pytest.raises(InputError, match="cannot write"):
        save_audio(tmp_path / "missing" / "a.wav", noise(10), 16_000)
    assert not list(tmp_path.iterdir())


def test_silence_is_no_more_than_one_step():
    assert is_silent(torch.zeros(10))
    assert is_silent(torch.full((10,), STEP))
    assert not is_silent(torch.tensor([0.0, 2 * STEP]))
    assert is_silent(torch.zeros(0))
