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
    is_training, number = model.training, 0
    model.eval()
    for layer in layers.values():
        layer.is_calibrating = True
    try:
        for batch in batches:
            model(batch)
            number += 1
    finally:
        for layer in layers.values():
            layer.is_calibrating = False
        model.train(is_training)
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
    model: nn.Module, batches: Sequence[Any], max_rate: float = MAX_SATURATION_RATE
) -> dict[str, float]:
    """Give each RSQ layer the largest α with which at most a share `max_rate` of its V is clipped to int8.

    Every integer range Q from Q₀ to 127 is tried, α = Q / Q₀, on the inputs that the layers get in these
    batches at the α that they have. α = 1 clips nothing. Ranges must be calibrated.

    Returns:
        α by the layer's name.

    Raises:
        InputError: there is no batch, no RSQ layer, a layer without a range, or the rate is no share.
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
    counts = {name: _Counts(layer) for name, layer in layers.items()}
    is_training = model.training
    model.eval()
    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(counts[name].hook)
            stack.callback(handle.remove)
        for batch in batches:
            model(batch)
    model.train(is_training)
    alphas = {}
    for name, layer in layers.items():
        scheme = counts[name].best(max_rate)
        layer.set_scheme(scheme)
        alphas[name] = scheme.alpha
    return alphas


class _Counts:
    """Counts what each α of a layer would clip."""

    def __init__(self, layer: QuantConv1d) -> None:
        assert isinstance(layer.scheme, RSQWinograd)
        least = layer.scheme.transform.safe_limit
        self.layer = layer
        self.reach = layer.input_quant.scale * layer.input_quant.limit
        self.schemes = [replace(layer.scheme, alpha=limit / least) for limit in range(least, 128)]
        self.counters = [SaturationCounter().to(self.reach.device) for _ in self.schemes]

    def hook(self, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        x: Tensor = arguments[0]
        for scheme, counter in zip(self.schemes, self.counters, strict=True):
            limit = scheme.input_limit
            scale = self.reach / limit
            inputs = (x * scale.reciprocal().to(x.dtype)).clamp(-limit, limit).round()
            scheme.transformed(inputs, self.layer.conv, counter)

    def best(self, max_rate: float) -> RSQWinograd:
        """The one with the largest α within the rate; the first clips nothing."""
        allowed = [s for s, c in zip(self.schemes, self.counters, strict=True) if c.rate <= max_rate]
        return allowed[-1]
