"""Sizes: settings of each model under the names tiny, small and base."""

from __future__ import annotations

from modicum.errors import InputError
from modicum.speech.acoustic_model import ModelSettings
from modicum.speech.compact.sanm import SanmSettings
from modicum.speech.conv_ctc import ConvCtcSettings
from modicum.speech.conv_dfsmn import ConvDfsmnCtcSettings
from modicum.speech.dfsmn import DfsmnCtcSettings
from modicum.speech.frame_model import FrameModelSettings
from modicum.speech.wav2letter import Wav2letterCtcSettings

SIZES: dict[str, dict[str, ModelSettings]] = {
    "conv": {
        "tiny": ConvCtcSettings(width=48, num_blocks=4),
        "small": ConvCtcSettings(width=96, num_blocks=6),
        "base": ConvCtcSettings(width=192, num_blocks=8),
    },
    "dfsmn": {
        "tiny": DfsmnCtcSettings(hidden=96, projection=48, num_layers=3),
        "small": DfsmnCtcSettings(hidden=192, projection=96, num_layers=5),
        "base": DfsmnCtcSettings(hidden=320, projection=160, num_layers=8),
    },
    "convdfsmn": {
        "tiny": ConvDfsmnCtcSettings(hidden=64, projection=64, num_layers=4),
        "small": ConvDfsmnCtcSettings(),
        "base": ConvDfsmnCtcSettings(hidden=256, projection=256, num_layers=8),
    },
    "wav2letter": {
        "tiny": Wav2letterCtcSettings(width=64, num_layers=4, head=96),
        "small": Wav2letterCtcSettings(),
        "base": Wav2letterCtcSettings(width=256, num_layers=8, head=512),
    },
    "frames": {
        "tiny": FrameModelSettings(width=64, num_layers=2),
        "small": FrameModelSettings(width=128, num_layers=3),
        "base": FrameModelSettings(width=256, num_layers=3),
    },
    "sanm": {
        "tiny": SanmSettings(width=64, num_layers=4, hidden=192),
        "small": SanmSettings(width=128, num_layers=6, hidden=384),
        "base": SanmSettings(width=192, num_layers=8, hidden=576),
    },
}
"""Ours; nothing of them is taken from a paper."""


def model_settings(model: str, size: str) -> ModelSettings:
    """The settings of a model and a size by name.

    Raises:
        InputError: a name is not known.
    """
    if model not in SIZES:
        raise InputError(f"model is {model!r}; choose one of {', '.join(SIZES)}")
    if size not in SIZES[model]:
        raise InputError(f"size is {size!r}; choose one of {', '.join(SIZES[model])}")
    return SIZES[model][size]
