"""SSDSettings: the record from which a detector's network is built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from modicum.errors import InputError, ModelError
from modicum.vision.detect.anchors import AnchorSettings
from modicum.vision.detect.backbone import ROUND_TO, STRIDES, BackboneSettings, scaled
from modicum.vision.detect.conv_norm import Channels

_EXTRA, _EXTRA_INNER, _HEAD = 512, 256, 192
_MOST_CHANNELS, _MOST_PIXELS, _MOST_EXTRAS = 8192, 4096, 4


@dataclass(frozen=True)
class SSDSettings:
    """What a detector's network is made of: all that is needed to build it again.

    Attributes:
        classes: names, background left out.
        backbone: which one.
        channels: of each channel group (see `ConvNorm`).
        height, width: of the input in pixels, multiples of 32.
        num_extras: feature layers behind the backbone, each of half the resolution.
        anchors: their sizes and shapes.

    Raises:
        ModelError: a group is missing or not known, or a value is out of range.
    """

    classes: tuple[str, ...]
    backbone: BackboneSettings
    channels: Channels
    height: int = 192
    width: int = 256
    num_extras: int = 2
    anchors: AnchorSettings = field(default_factory=AnchorSettings)

    def __post_init__(self) -> None:
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise ModelError(f"the classes are {list(self.classes)}: give at least one, each once")
        for name in ("height", "width"):
            value = getattr(self, name)
            if not STRIDES[-1] <= value <= _MOST_PIXELS or value % STRIDES[-1]:
                raise ModelError(
                    f"the {name} of the input is {value}: give a multiple of 32 from 32 to {_MOST_PIXELS:,}"
                )
        if not 0 <= self.num_extras <= _MOST_EXTRAS:
            raise ModelError(f"there are {self.num_extras} extra layers: give 0 to {_MOST_EXTRAS}")
        wanted = self._usual(1.0).keys()
        if self.channels.keys() != wanted:
            odd = sorted(self.channels.keys() ^ wanted)
            raise ModelError(
                f"the record of channels does not fit {self.backbone.kind} with blocks "
                f"{list(self.backbone.blocks)} and {self.num_extras} extra layers: {odd[0]!r} is "
                f"{'not known' if odd[0] in self.channels else 'missing'}"
            )
        for group, number in self.channels.items():
            if not isinstance(number, int) or not 1 <= number <= _MOST_CHANNELS:
                raise ModelError(f"{group} has {number} channels: give 1 to {_MOST_CHANNELS:,}")

    @classmethod
    def of(
        cls,
        classes: tuple[str, ...],
        backbone: str = "resnet26",
        width_factor: float = 0.25,
        size: tuple[int, int] = (192, 256),
    ) -> SSDSettings:
        """A detector of a usual shape.

        Args:
            classes: names.
            backbone: a name of `modicum.vision.detect.backbone.NAMED`.
            width_factor: share of the usual channels, in all layers.
            size: height and width of the input.

        Raises:
            InputError, ModelError: a value is out of range.
        """
        if not 0 < width_factor < math.inf:
            raise InputError(f"the width factor is {width_factor}: give a number above 0")
        settings = BackboneSettings.of(backbone)
        channels = settings.channels(1.0) | _branches(1.0, 2)
        blank = cls(classes, settings, channels, *size)
        return replace(blank, channels=blank._usual(width_factor))

    @property
    def num_levels(self) -> int:
        """Feature maps."""
        return len(STRIDES) + self.num_extras

    @property
    def backbone_groups(self) -> tuple[str, ...]:
        """Channel groups of the backbone."""
        return tuple(self.backbone.channels(1.0))

    @property
    def branch_groups(self) -> tuple[str, ...]:
        """Channel groups of extra layers and heads."""
        return tuple(_branches(1.0, self.num_extras))

    def with_channels(self, channels: Channels) -> SSDSettings:
        """The same with other channels of some groups."""
        return replace(self, channels={**self.channels, **channels})

    def uniform(self, factor: float) -> SSDSettings:
        """The same with all channels multiplied, rounded to multiples of 8, at least 8."""
        return self.with_channels({name: scaled(number, factor) for name, number in self.channels.items()})

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> SSDSettings:
        """As it was told.

        Raises:
            KeyError, TypeError, ValueError: a value is missing, not known, or out of range.
        """
        backbone, anchors = told["backbone"], told["anchors"]
        return cls(
            classes=tuple(str(name) for name in told["classes"]),
            backbone=BackboneSettings(str(backbone["kind"]), tuple(int(x) for x in backbone["blocks"])),
            channels={str(name): number for name, number in told["channels"].items()},
            height=int(told["height"]),
            width=int(told["width"]),
            num_extras=int(told["num_extras"]),
            anchors=AnchorSettings(float(anchors["size"]), tuple(float(x) for x in anchors["ratios"])),
        )

    def _usual(self, factor: float) -> dict[str, int]:
        return self.backbone.channels(factor) | _branches(factor, self.num_extras)


def _branches(factor: float, num_extras: int) -> dict[str, int]:
    """Channels of extra layers and heads."""
    found = {}
    for number in range(num_extras):
        found[f"extra{number}.inner"] = scaled(_EXTRA_INNER, factor)
        found[f"extra{number}"] = scaled(_EXTRA, factor)
    for level in range(len(STRIDES) + num_extras):
        found[f"head{level}"] = scaled(_HEAD, factor)
    return found


def smallest(channels: int, max_ratio: float) -> int:
    """The fewest channels that pruning leaves of a group: (1 - max_ratio), as a multiple of 8, at least 8."""
    least = math.ceil(channels * (1 - max_ratio) / ROUND_TO) * ROUND_TO
    return min(channels, max(ROUND_TO, least))
