"""Quantization: convolutions with int8 weights and inputs, by `modicum.quant`'s fake quantisation.

Norms are folded first. Weights have a scale for each output channel, inputs one for each convolution, whose
range is the largest absolute value of some images ("max") or that with the least squared error ("mse"; see
`modicum.quant.FakeQuant`). torch computes the rounded numbers in float32; onnxruntime runs the exported file
in int8. A file holds int8 weights, so it is about a quarter of the float one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modicum.errors import InputError, ModelError
from modicum.quant.fake_quant import FakeQuant, FakeQuantSettings, RangeMethod
from modicum.vision.detect.conv_norm import fold_norms
from modicum.vision.detect.detector import Detector
from modicum.vision.detect.ssd import SSD

_INT8 = 127


class QuantConv2d(nn.Module):
    """A convolution of integers in [-127, 127] times scales.

    Args:
        conv: of which.
        method: how the input's range is found.
        name: for errors.
    """

    bias: Tensor
    integers: Tensor
    weight_scale: Tensor

    def __init__(self, conv: nn.Conv2d, method: RangeMethod, name: str) -> None:
        super().__init__()
        self.stride, self.padding, self.groups = conv.stride, conv.padding, conv.groups
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size = conv.kernel_size
        weights = FakeQuant(FakeQuantSettings(_INT8, "max"), (conv.out_channels, 1, 1, 1), name)
        weights.observe(conv.weight)
        integers, scale = weights.quantize(conv.weight.detach())
        self.register_buffer("integers", integers.to(torch.int8))
        self.register_buffer("weight_scale", scale.detach().clone())
        bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach().clone()
        self.register_buffer("bias", bias)
        self.input_quant = FakeQuant(FakeQuantSettings(_INT8, method), (), name)
        self.is_calibrating = False

    @property
    def weight(self) -> Tensor:
        """[K, C / groups, r, r] float32."""
        return self.integers.to(self.weight_scale.dtype) * self.weight_scale

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, K, H', W']."""
        if self.is_calibrating:
            self.input_quant.observe(x)
        x = self.input_quant(x)
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, 1, self.groups)


@torch.no_grad()
def quantized_detector(
    detector: Detector, batches: Iterable[Tensor], method: RangeMethod = "mse"
) -> Detector:
    """A copy with int8 convolutions, ranges found on some inputs [B, 3, H, W], 0 to 255; all batches count
    alike.

    Raises:
        InputError: there is no batch, or a layer is given values that are not finite.
        ModelError: it is quantised already.
    """
    if "quantized" in detector.about:
        raise ModelError("the detector is int8 already: give the float one")
    network = copy.deepcopy(detector.network).eval()
    layers = _replaced(network, method)
    for layer in layers.values():
        layer.is_calibrating = True
    count = 0
    for count, batch in enumerate(batches, 1):
        for layer in layers.values():
            # The mean over batches, where a moving average would count the first ones most.
            layer.input_quant.settings = replace(layer.input_quant.settings, momentum=1 / count)
        network.raw_outputs(batch)
    if not count:
        raise InputError("there is no image to find ranges with: give at least one batch")
    for layer in layers.values():
        layer.is_calibrating = False
    return Detector(network, {**detector.about, "quantized": {"bits": 8, "ranges": method}})


def quantized_bytes(detector: Detector) -> bytes:
    """The contents of an int8 detector's file."""
    from modicum.vision.detect.detector_file import packed

    tensors = {name: stored for name, (_, stored) in _stored(detector.network).items()}
    for name, layer in _layers(detector.network).items():
        tensors[f"{name}.input_scale"] = layer.input_quant.scale.reshape(1)  # never 0, as a step may be
    return packed(detector.network.settings, tensors, detector.about)


@torch.no_grad()
def fill_quantized(network: SSD, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Make a network's convolutions int8, with a file's tensors.

    Raises:
        ModelError: a tensor is missing, not known, or has another shape or dtype.
    """
    _replaced(network, "max")
    wanted = _stored(network)
    odd = sorted(wanted.keys() ^ tensors.keys())
    if odd:
        raise ModelError(f"{path} is of another architecture than its record says: {odd[0]}")
    for name, (tensor, stored) in wanted.items():
        found = tensors[name]
        if found.shape != stored.shape or found.dtype != stored.dtype:
            raise ModelError(
                f"{path} is of another architecture than its record says: {name} has the shape "
                f"{list(found.shape)} and dtype {found.dtype}, not {list(stored.shape)} and {stored.dtype}; "
                "write the file again"
            )
        if found.is_floating_point() and not bool(found.isfinite().all()):
            raise ModelError(f"{path} holds values of {name} that are not finite: quantise it again")
        tensor.copy_(found.reshape(tensor.shape))


def _stored(network: SSD) -> dict[str, tuple[Tensor, Tensor]]:
    """Tensors of int8 convolutions by their names in a file: as in the network, and as in the file."""
    found = {}
    for name, layer in _layers(network).items():
        found[f"{name}.weight"] = (layer.integers, layer.integers)
        found[f"{name}.weight_scale"] = (layer.weight_scale, layer.weight_scale.flatten())
        found[f"{name}.bias"] = (layer.bias, layer.bias)
        found[f"{name}.input_scale"] = (layer.input_quant.step, layer.input_quant.step.reshape(1))
    return found


def _replaced(network: SSD, method: RangeMethod) -> dict[str, QuantConv2d]:
    """Fold norms and replace all convolutions, in place."""
    fold_norms(network)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Conv2d):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, QuantConv2d(module, method, name))
    return _layers(network)


def _layers(network: nn.Module) -> dict[str, QuantConv2d]:
    return {name: module for name, module in network.named_modules() if isinstance(module, QuantConv2d)}


def quantized_layers(detector: Detector) -> dict[str, Any]:
    """The int8 convolutions of a detector, by name; empty for a float one."""
    return dict(_layers(detector.network))
