"""Cost: multiply-accumulates, parameters and file bytes of a record, without running it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modicum.vision.detect.conv_norm import Channels, ConvNorm, channels_of
from modicum.vision.detect.ssd import SSD
from modicum.vision.detect.ssd_settings import SSDSettings


@dataclass(frozen=True)
class ConvCost:
    """What a convolution costs, as a function of channels.

    Attributes:
        name: of the module.
        inputs, outputs: channel groups; outputs is None where the number is fixed.
        fixed: output channels where outputs is None.
        taps: kernel height · width.
        positions: output height · width.
        is_depthwise: see `ConvShape`.
    """

    name: str
    inputs: str
    outputs: str | None
    fixed: int
    taps: int
    positions: int
    is_depthwise: bool

    def weights(self, channels: Channels) -> int:
        """Numbers of its kernel."""
        inputs = channels_of(channels, self.inputs)
        outputs = self.fixed if self.outputs is None else channels[self.outputs]
        return self.taps * (inputs if self.is_depthwise else inputs * outputs)

    def others(self, channels: Channels) -> int:
        """Numbers of its bias, or of its norm's weight and bias."""
        return self.fixed if self.outputs is None else 2 * channels[self.outputs]


@dataclass(frozen=True)
class CostTable:
    """All convolutions of a network.

    Multiply-accumulates are those of convolutions; additions of biases, norms, pooling and the decoding of
    boxes are left out, as is usual.
    """

    convs: tuple[ConvCost, ...]

    @classmethod
    def of(cls, settings: SSDSettings) -> CostTable:
        """Of a record, and of all records that differ from it in channels only."""
        with torch.device("meta"):
            network = SSD(settings).eval()
        positions: dict[nn.Module, int] = {}

        def note(module: nn.Module, _: object, output: Tensor) -> None:
            positions[module] = output.shape[-2] * output.shape[-1]

        hooks = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, nn.Conv2d)]
        network.raw_outputs(torch.empty(1, 3, settings.height, settings.width, device="meta"))
        for hook in hooks:
            hook.remove()
        return cls(tuple(_conv_costs(network, positions)))

    def macs(self, channels: Channels) -> int:
        """Multiply-accumulates of one image."""
        return sum(conv.weights(channels) * conv.positions for conv in self.convs)

    def num_parameters(self, channels: Channels) -> int:
        """Weights and biases."""
        return sum(conv.weights(channels) + conv.others(channels) for conv in self.convs)


def _conv_costs(network: SSD, positions: Mapping[nn.Module, int]) -> list[ConvCost]:
    found = []
    for name, module in network.named_modules():
        if isinstance(module, ConvNorm):
            conv, shape = module.conv, module.shape
            found.append(
                ConvCost(
                    f"{name}.conv",
                    module.inputs,
                    module.outputs,
                    0,
                    shape.kernel**2,
                    positions[conv],
                    shape.is_depthwise,
                )
            )
    for level, head in enumerate(network.heads):
        for part in ("classes", "boxes"):
            conv = getattr(head, part)
            name = f"heads.{level}.{part}"
            found.append(ConvCost(name, f"head{level}", None, conv.out_channels, 1, positions[conv], False))
    return found
