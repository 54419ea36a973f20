"""Quantisation: one-dimensional convolutions in int8, direct and by Winograd's transform.

After "INT8 Winograd Acceleration for Conv1D Equipped ASR Models Deployed on Mobile Devices" (Yao et al. 2020,
arXiv 2010.14841), of which we could read the abstract: what it leaves open is our reading, and each file says
so. The names below load when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modicum.lazy_names import lazy_names

if TYPE_CHECKING:
    from modicum.quant.calibration import calibrate, counting, search_alphas
    from modicum.quant.choice import Conv1dShape, conv1d_oracle, fastest
    from modicum.quant.conv import QuantConv1d, RangeSettings
    from modicum.quant.convolution import ConvSettings, winograd_conv1d
    from modicum.quant.fake_quant import FakeQuant, FakeQuantSettings
    from modicum.quant.integer_conv import IntegerConv1d
    from modicum.quant.loss import RSQLossSettings, noise_loss, recorded_outputs, rsq_loss
    from modicum.quant.native import native_kernels
    from modicum.quant.noise import sqnr
    from modicum.quant.replacement import QuantSettings, convert_model, quantize_model
    from modicum.quant.schemes import (
        DirectInt8,
        ExactWinograd,
        RangeLimitedWinograd,
        RSQWinograd,
        TapwiseWinograd,
    )
    from modicum.quant.transform import WinogradTransform, winograd_transform

_HOMES = {
    "calibration": ("calibrate", "counting", "search_alphas"),
    "choice": ("Conv1dShape", "conv1d_oracle", "fastest"),
    "conv": ("QuantConv1d", "RangeSettings"),
    "convolution": ("ConvSettings", "winograd_conv1d"),
    "fake_quant": ("FakeQuant", "FakeQuantSettings"),
    "integer_conv": ("IntegerConv1d",),
    "loss": ("RSQLossSettings", "noise_loss", "recorded_outputs", "rsq_loss"),
    "native": ("native_kernels",),
    "noise": ("sqnr",),
    "replacement": ("QuantSettings", "convert_model", "quantize_model"),
    "schemes": (
        "DirectInt8",
        "ExactWinograd",
        "RangeLimitedWinograd",
        "RSQWinograd",
        "TapwiseWinograd",
    ),
    "transform": ("WinogradTransform", "winograd_transform"),
}

__all__ = [  # noqa: RUF022  # in the order of the reader's interest
    "quantize_model",
    "QuantSettings",
    "RangeSettings",
    "calibrate",
    "search_alphas",
    "counting",
    "convert_model",
    "QuantConv1d",
    "IntegerConv1d",
    "DirectInt8",
    "RSQWinograd",
    "RangeLimitedWinograd",
    "TapwiseWinograd",
    "ExactWinograd",
    "FakeQuant",
    "FakeQuantSettings",
    "rsq_loss",
    "RSQLossSettings",
    "noise_loss",
    "recorded_outputs",
    "WinogradTransform",
    "winograd_transform",
    "winograd_conv1d",
    "ConvSettings",
    "native_kernels",
    "sqnr",
    "Conv1dShape",
    "conv1d_oracle",
    "fastest",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, globals())
