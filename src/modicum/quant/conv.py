"""QuantConv1d: a convolution trained with fake quantisation, for every scheme."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from modicum.quant.convolution import (
    ConvSettings,
    as_batch,
    computing_dtype,
    direct_conv1d,
    without_autocast,
)
from modicum.quant.fake_quant import FakeQuant, FakeQuantSettings, RangeMethod
from modicum.quant.integer_conv import IntegerConv1d
from modicum.quant.saturation import SaturationCounter
from modicum.quant.schemes import RSQWinograd
from modicum.quant.schemes.base import Scheme
from modicum.quant.schemes.state import restored_scheme, scheme_state


@dataclass(frozen=True)
class RangeSettings:
    """How the ranges of a layer are found.

    Attributes:
        input: method of the input's range.
        weight: method of the weights' ranges, from the weights as they are at each call; `max` and `ema` are
            the same there.
        momentum: of the input's range.

    Raises:
        InputError: a method is not known, or the momentum is out of range.
    """

    input: RangeMethod = "ema"
    weight: RangeMethod = "max"
    momentum: float = 0.1

    def __post_init__(self) -> None:
        FakeQuantSettings(method=self.input, momentum=self.momentum)
        FakeQuantSettings(method=self.weight)


@dataclass(frozen=True)
class LayerSettings:
    """What a quantised layer is.

    Attributes:
        conv: taps, padding and the like.
        scheme: how integers are summed.
        ranges: how their ranges are found.
        name: of the layer, for errors.
    """

    conv: ConvSettings
    scheme: Scheme
    ranges: RangeSettings = field(default_factory=RangeSettings)
    name: str = "a layer"


class QuantConv1d(nn.Module):
    """A one-dimensional convolution with quantised input and weights.

    Parameters are named as torch.nn.Conv1d's, so its state dict can be loaded with strict=False (it has no
    ranges and no scheme). In training mode an `ema` range of the input follows each batch; `calibrate` sets
    all ranges.

    Args:
        weight: [K, C / groups, r]. A parameter is used as it is, and stays shared with whoever has it.
        bias: [K], or None; as the weight.
        settings: scheme, padding, ranges and name.

    Raises:
        InputError: the scheme cannot compute such a convolution.
    """

    input_quant: FakeQuant
    weight_quant: FakeQuant

    def __init__(self, weight: Tensor, bias: Tensor | None, settings: LayerSettings) -> None:
        super().__init__()
        scheme, ranges = settings.scheme, settings.ranges
        scheme.check(settings.conv, weight.shape[1])
        self.conv, self.scheme, self.name = settings.conv, scheme, settings.name
        self.weight = _parameter(weight)
        self.bias = None if bias is None else _parameter(bias)
        of_input = FakeQuantSettings(scheme.input_limit, ranges.input, ranges.momentum)
        method: RangeMethod = "ema" if ranges.weight == "max" else ranges.weight
        of_weight = FakeQuantSettings(scheme.weight_limit, method, 1.0)
        self.input_quant = FakeQuant(of_input, scheme.input_scale_shape, f"the input of {self.name}")
        shape = scheme.weight_scale_shape(weight.shape[0])
        self.weight_quant = FakeQuant(of_weight, shape, f"the weights of {self.name}")
        self.counter = SaturationCounter()
        self.is_calibrating = False
        self.to(weight.device, weight.dtype)

    @classmethod
    def of(
        cls, conv: nn.Conv1d, scheme: Scheme, ranges: RangeSettings | None = None, name: str = "a layer"
    ) -> Self:
        """A float layer, quantised.

        Raises:
            InputError: the scheme cannot compute it.
        """
        settings = LayerSettings(ConvSettings.of(conv), scheme, ranges or RangeSettings(), name)
        return cls(conv.weight, conv.bias, settings)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, T] -> [N, K, T_out], or [C, T] -> [K, T_out], in the dtype of the input.

        Computed in float32 where the layer is float16 or bfloat16, and under autocast.

        Raises:
            InputError: the shape is another one, there is no range yet, the sequence is too short, or a value
                is not a number while ranges are measured.
        """
        with without_autocast(x):
            sums, scale = self.sums(x)
            return self._finished(self.scheme.finish(sums * scale, self.conv.out_length(x.shape[-1])), x)

    def sums(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sums of products, whole numbers, and by what they are to be multiplied. N is 1 for [C, T].

        Raises:
            InputError: as `forward`.
        """
        with without_autocast(x):
            batch = self.batch(x)
            length = self.conv.out_length(batch.shape[-1])
            inputs, input_scale = self._quantize_input(batch)
            weights, weight_scale = self.quantize_weight()
            counter = self.counter if self.input_quant.is_counting else None
            sums = self.scheme.sums(inputs, weights, self.conv, length, counter)
            return sums, self.scheme.output_scale(input_scale, weight_scale)

    def batch(self, x: Tensor) -> Tensor:
        """The input as [N, C, T] in the dtype in which the layer computes.

        Raises:
            InputError: it has another shape, or no floating dtype.
        """
        channels = self.weight.shape[1] * self.conv.groups
        return as_batch(x, channels, self.name).to(computing_dtype(self.weight.dtype))

    def quantize_weight(self) -> tuple[Tensor, Tensor]:
        """Weights as whole numbers, and their scale."""
        with without_autocast(self.weight):
            prepared = self.scheme.prepare_weight(self.weight.to(computing_dtype(self.weight.dtype)))
            self.weight_quant.observe(prepared)
            return self.weight_quant.quantize(prepared)

    def float_output(self, x: Tensor) -> Tensor:
        """What the layer gives without quantisation."""
        with without_autocast(x):
            batch = self.batch(x)
            return self._finished(direct_conv1d(batch, self.weight.to(batch.dtype), self.conv), x)

    @torch.inference_mode(False)  # or the new tensors could not be used outside of it
    @torch.no_grad()
    def convert(self) -> IntegerConv1d:
        """The layer for inference, with integer weights.

        Raises:
            InputError: there is no range yet.
        """
        weights, weight_scale = self.quantize_weight()
        return IntegerConv1d(
            self.scheme,
            self.conv,
            weights,
            (self.input_quant.scale.detach(), weight_scale),
            self.bias,
            self.name,
        )

    def set_scheme(self, scheme: RSQWinograd) -> None:
        """Use another α: the same ranges on another integer range.

        Raises:
            InputError: the scheme cannot compute this convolution.
        """
        scheme.check(self.conv, self.weight.shape[1])
        self.scheme = scheme
        self.input_quant.set_limit(scheme.input_limit)

    @property
    def saturation_rate(self) -> float:
        """Transformed inputs that were clipped to int8, as a share of all, since counting began."""
        return self.counter.rate

    def get_extra_state(self) -> Tensor:
        """The scheme, with its α, for the state dict."""
        return scheme_state(self.scheme)

    def set_extra_state(self, state: Tensor) -> None:
        """Take α from a state dict.

        Raises:
            InputError: it was saved with another scheme.
        """
        self.scheme = restored_scheme(state, self.scheme, self.name)
        # Not set_limit: the step comes from the state dict, too.
        self.input_quant.limit = self.scheme.input_limit

    def extra_repr(self) -> str:
        """What print shows."""
        return f"{self.scheme}, {tuple(self.weight.shape)}, {self.conv}"

    def _finished(self, outputs: Tensor, x: Tensor) -> Tensor:
        """Outputs with the bias, of as many dimensions and of the dtype of the input."""
        if self.bias is not None:
            outputs = outputs + self.bias[:, None].to(outputs.dtype)
        outputs = outputs.to(x.dtype)
        return outputs if x.dim() == 3 else outputs[0]

    def _quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        prepared = self.scheme.prepare_input(x, self.conv)
        is_following = self.training and self.input_quant.settings.method == "ema"
        if self.is_calibrating or is_following:
            self.input_quant.observe(prepared)
        return self.input_quant.quantize(prepared)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach().clone())
