"""Context: which feature frames an output frame of a model depends on."""

from __future__ import annotations

from dataclasses import dataclass

from modicum.errors import ModelError
from modicum.speech.acoustic_model import ModelSettings
from modicum.speech.compact.sanm import ALL, SanmSettings
from modicum.speech.conv_ctc import ConvCtcSettings
from modicum.speech.dfsmn import DfsmnCtcSettings


@dataclass(frozen=True)
class Context:
    """Feature frames before and after the one at which an output frame is centred, t · subsampling."""

    left: int
    right: int


def model_context(settings: ModelSettings) -> Context:
    """Of a model in evaluation mode.

    Raises:
        ModelError: attention sees all frames, or the model is of a kind whose context is not known.
    """
    stride = settings.subsampling
    if isinstance(settings, ConvCtcSettings):
        reach = settings.num_blocks * (settings.kernel // 2)
        return Context(stride * (1 + reach), stride * (1 + reach))
    if isinstance(settings, DfsmnCtcSettings):
        left = settings.num_layers * settings.left * settings.left_stride
        right = settings.num_layers * settings.right * settings.right_stride
        return Context(stride * (1 + left), stride * (1 + right))
    if isinstance(settings, SanmSettings):
        if ALL in (settings.attention_left, settings.attention_right):
            raise ModelError(
                "attention of this model sees all frames of a recording, so it cannot be streamed: train one "
                "with limits, as SanmSettings(attention_left=16, attention_right=2)"
            )
        half = settings.kernel // 2
        left = settings.num_layers * max(settings.attention_left, half + settings.shift)
        right = settings.num_layers * max(settings.attention_right, half - settings.shift)
        return Context(stride * (1 + left), stride * (1 + right))
    raise ModelError(f"the context of {settings.name} models is not known: stream conv, dfsmn or sanm")
