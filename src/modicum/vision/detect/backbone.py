"""Backbone: what gives a detector its feature maps, and the kinds that there are."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from modicum.errors import InputError, ModelError
from modicum.vision.detect.conv_norm import Channels

ROUND_TO = 8
"""Channels of a group are a multiple of it, after scaling and after pruning."""
STRIDES = (8, 16, 32)
"""Of a backbone's maps."""
_MOST_BLOCKS = 64


class Backbone(nn.Module):
    """A network that gives maps at strides 8, 16 and 32; made of `ConvNorm` layers between named groups."""

    num_stages: ClassVar[int]
    """Numbers in `BackboneSettings.blocks`."""
    taps: tuple[str, ...]
    """The channel groups of its maps."""

    def __init__(self, channels: Channels, blocks: tuple[int, ...]) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps of images [B, 3, H, W]."""

    @staticmethod
    @abstractmethod
    def channels(width: float, blocks: tuple[int, ...]) -> dict[str, int]:
        """Of all groups at a share of the usual width."""


@dataclass(frozen=True)
class BackboneSettings:
    """Which backbone, without its channels.

    Attributes:
        kind: resnet_v1d, mobilenet, or one that was registered.
        blocks: of each stage, as the kind takes them.

    Raises:
        ModelError: the kind is not known, or the blocks do not fit it.
    """

    kind: str
    blocks: tuple[int, ...]

    def __post_init__(self) -> None:
        kinds = _kinds()
        if self.kind not in kinds:
            raise ModelError(f"the backbone is {self.kind!r}: this modicum knows {', '.join(kinds)}")
        wanted = kinds[self.kind].num_stages
        is_fit = len(self.blocks) == wanted and all(1 <= number <= _MOST_BLOCKS for number in self.blocks)
        if not is_fit:
            raise ModelError(
                f"{self.kind} has {list(self.blocks)} blocks: give {wanted} numbers of 1 to {_MOST_BLOCKS}"
            )

    @classmethod
    def of(cls, name: str) -> BackboneSettings:
        """By name.

        Raises:
            InputError: it is not known.
        """
        if name not in NAMED:
            raise InputError(f"the backbone is {name!r}: choose one of {', '.join(NAMED)}")
        return cls(*NAMED[name])

    def channels(self, width: float) -> dict[str, int]:
        """Of all groups at a share of the usual width."""
        return _kinds()[self.kind].channels(width, self.blocks)

    def build(self, channels: Channels) -> Backbone:
        """A network with random weights."""
        return _kinds()[self.kind](channels, self.blocks)


_OWN: dict[str, tuple[str, tuple[int, ...]]] = {
    "resnet14": ("resnet_v1d", (1, 1, 1, 1)),
    "resnet26": ("resnet_v1d", (2, 2, 2, 2)),
    "resnet50": ("resnet_v1d", (3, 4, 6, 3)),
    "mobilenet": ("mobilenet", (6,)),
}
NAMED = dict(_OWN)
"""Backbones by name: kind and blocks; those that were registered, too."""


def scaled(usual: int, width: float) -> int:
    """A share of the usual number of channels, as a multiple of 8."""
    return max(ROUND_TO, round(usual * width / ROUND_TO) * ROUND_TO)


_registered: dict[str, type[Backbone]] = {}


def register_backbone(name: str, made: type[Backbone], blocks: tuple[int, ...]) -> None:
    """Let `SSDSettings.of` and records name a backbone of the user's; its files load where it is registered.

    Args:
        name: of the backbone and of its kind in records; an earlier one of that name gives way.
        made: its class.
        blocks: as many numbers as the class has stages.

    Raises:
        InputError: the name is one of modicum's own.
        ModelError: the blocks do not fit the class.
    """
    if name in _OWN or name in {kind for kind, _ in _OWN.values()}:
        raise InputError(f"{name} is a backbone of modicum's: give another name")
    _registered[name] = made
    try:
        NAMED[name] = (BackboneSettings(name, blocks).kind, blocks)
    except ModelError:
        del _registered[name]
        raise


def _kinds() -> dict[str, type[Backbone]]:
    from modicum.vision.detect.mobilenet import MobileNet
    from modicum.vision.detect.resnet_v1d import ResNetV1d

    return {"resnet_v1d": ResNetV1d, "mobilenet": MobileNet, **_registered}
