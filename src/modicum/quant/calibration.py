"""Calibration: ranges of all quantised layers from some batches, and the α of each RSQ layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from modicum.errors import InputError
from modicum.quant.conv import QuantConv1d
from modicum.quant.convolution import direct_conv1d, without_autocast
from modicum.quant.saturation import SaturationCounter
from modicum.quant.schemes import RSQWinograd

MAX_SATURATION_RATE = 1e-4
"""Share of transformed inputs that may be clipped; ours."""


def quantized_layers(model: nn.Module) -> dict[str, QuantConv1d]:
    """The quantised convolutions of a model, by name.

    Raises:
        InputError: there is none.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, QuantConv1d)}
    if not found:
        raise InputError("the model has no quantised layer: run modicum.quant.quantize_model(model) first")
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, while it is open; each module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Run batches through the model, in evaluation mode, and set the ranges of its quantised layers.

    A layer's input is that of the quantised layers before it.

    Args:
        batches: each is what the model is called with.

    Raises:
        InputError: there is no quantised layer or no batch, or a layer is given values that are not finite
            numbers; it is named.
    """
    layers = quantized_layers(model)
    number = 0
    for layer in layers.values():
        layer.is_calibrating = True
    try:
        with evaluating(model):
            for batch in batches:
                model(batch)
                number += 1
    finally:
        for layer in layers.values():
            layer.is_calibrating = False
    if not number:
        raise InputError("there is no batch to calibrate with: give at least one")


@contextmanager
def counting(model: nn.Module) -> Iterator[None]:
    """Count clipped values of all quantised layers, from 0, while it is open."""
    layers = quantized_layers(model).values()
    for layer in layers:
        for counter in (layer.counter, layer.input_quant.counter, layer.weight_quant.counter):
            counter.reset()
        layer.input_quant.is_counting = layer.weight_quant.is_counting = True
    try:
        yield
    finally:
        for layer in layers:
            layer.input_quant.is_counting = layer.weight_quant.is_counting = False


@torch.no_grad()
def search_alphas(
    model: nn.Module, batches: Sequence[Any], max_rate: float = MAX_SATURATION_RATE, refine: bool = True
) -> dict[str, float]:
    """Set the α of each RSQ layer from some batches.

    Every integer range Q from Q₀ to 127 is tried, α = Q / Q₀, on the inputs that the layers get at the α that
    they have. Of those with which at most a share `max_rate` of the transformed inputs is clipped to int8 (α
    = 1 clips none) the layer gets the one whose outputs differ least from the float layer's, by squared
    error, or without `refine` the largest. A few clipped values can cost more than the finer rounding brings,
    so the rate alone does not decide. Ranges must be calibrated.

    Returns:
        α by the layer's name.

    Raises:
        InputError: there is no batch, no RSQ layer, a layer without a range, the rate is no share, or a layer
            is given values that are not finite numbers.
    """
    if not 0 <= max_rate < 1:
        raise InputError(f"the largest saturation rate is {max_rate}: give a share of at least 0 and below 1")
    layers = {
        name: layer
        for name, layer in quantized_layers(model).items()
        if isinstance(layer.scheme, RSQWinograd)
    }
    if not layers or not batches:
        raise InputError(f"{len(layers)} RSQ layers, {len(batches)} batches: give at least one of each")
    trials = {name: _Trials(layer, refine) for name, layer in layers.items()}
    with evaluating(model), ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(trials[name].hook).remove)
        for batch in batches:
            model(batch)
    alphas = {}
    for name, layer in layers.items():
        scheme = trials[name].best(max_rate)
        layer.set_scheme(scheme)
        alphas[name] = scheme.alpha
    return alphas


class _Trials:
    """What each α of a layer would clip, and how far its outputs would be off."""

    def __init__(self, layer: QuantConv1d, has_errors: bool) -> None:
        assert isinstance(layer.scheme, RSQWinograd)
        least = layer.scheme.transform.safe_limit
        self.layer, self.has_errors = layer, has_errors
        self.reach = layer.input_quant.scale * layer.input_quant.limit
        self.schemes = [replace(layer.scheme, alpha=limit / least) for limit in range(least, 128)]
        self.counters = [SaturationCounter().to(self.reach.device) for _ in self.schemes]
        self.errors = [0.0 for _ in self.schemes]

    def hook(self, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        with without_autocast(arguments[0]):
            self.add(self.layer.batch(arguments[0]))

    def add(self, x: Tensor) -> None:
        """Take account of a batch [N, C, T]."""
        if not bool(x.isfinite().all()):
            raise InputError(f"{self.layer.input_quant.name} was given values that are not finite numbers")
        conv, length = self.layer.conv, self.layer.conv.out_length(x.shape[-1])
        weights, weight_scale = self.layer.quantize_weight()
        exact = direct_conv1d(x, self.layer.weight.to(x.dtype), conv) if self.has_errors else None
        for place, (scheme, counter) in enumerate(zip(self.schemes, self.counters, strict=True)):
            limit = scheme.input_limit
            scale = self.reach / limit
            inputs = (x * scale.reciprocal().to(x.dtype)).clamp(-limit, limit).round()
            if exact is None:
                scheme.transformed(inputs, conv, counter)
                continue
            sums = scheme.sums(inputs, weights, conv, length, counter)
            outputs = sums * scheme.output_scale(scale, weight_scale)
            self.errors[place] += float((outputs - exact).double().square().sum())

    def best(self, max_rate: float) -> RSQWinograd:
        """Of those within the rate the one with the least error, or the largest α. The first clips none."""
        allowed = [i for i, counter in enumerate(self.counters) if counter.rate <= max_rate]
        # Of equal errors the smaller α.
        best = min(allowed, key=lambda i: self.errors[i]) if self.has_errors else allowed[-1]
        return self.schemes[best]
