"""Budget: what a pruned detector may take of multiply-accumulates, file bytes, or measured time."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from modicum.errors import InputError
from modicum.vision.detect.conv_norm import Channels, fold_norms
from modicum.vision.detect.cost import CostTable
from modicum.vision.detect.detector_file import file_bytes
from modicum.vision.detect.ssd import SSD
from modicum.vision.detect.ssd_settings import SSDSettings

Resource = Literal["macs", "bytes", "latency"]
_FACTORS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "KB": 1e3, "MB": 1e6, "KIB": 2.0**10, "MIB": 2.0**20}
_UNITS = {"macs": ("", "K", "M", "G"), "bytes": ("", "KB", "MB", "KIB", "MIB"), "latency": ("MS", "S")}
_SECONDS = {"MS": 1e-3, "S": 1.0}
_ROUNDS = 51


@dataclass(frozen=True)
class Budget:
    """The most of one resource.

    Attributes:
        resource: macs (of one image), bytes (of the file), or latency (seconds of one image on this machine
            with torch's number of threads).
        limit: the most; a share of the given detector's where is_share.
        is_share: whether the limit is a share.

    Raises:
        InputError: the resource is not known, or the limit is out of range.
    """

    resource: Resource
    limit: float
    is_share: bool = False

    def __post_init__(self) -> None:
        if self.resource not in get_args(Resource):
            raise InputError(
                f"the resource is {self.resource!r}: choose one of {', '.join(get_args(Resource))}"
            )
        if not self.limit > 0 or (self.is_share and self.limit > 1):
            told = f"{100 * self.limit:g}%" if self.is_share else f"{self.limit:g}"
            wanted = "a share above 0% and of at most 100%" if self.is_share else "a number above 0"
            raise InputError(f"the budget of {self.resource} is {told}: give {wanted}")

    @classmethod
    def parse(cls, resource: Resource, text: str) -> Budget:
        """From "60M", "500KB", "3.5ms" or "25%".

        Raises:
            InputError: it is none of these.
        """
        match = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*|%)\s*", text)
        try:
            number = float(match[1]) if match else -1.0
        except ValueError:
            number = -1.0
        unit = match[2].upper() if match else ""
        if number > 0 and unit == "%":
            return cls(resource, number / 100, is_share=True)
        if number <= 0 or unit not in _UNITS[resource]:
            example = {"macs": "60M", "bytes": "500KB", "latency": "3.5ms"}[resource]
            raise InputError(f"the budget of {resource} is {text!r}: give one such as {example}, or 25%")
        return cls(resource, number * (_SECONDS[unit] if resource == "latency" else _FACTORS[unit]))

    def absolute(self, whole: float) -> float:
        """The limit, where the given detector takes `whole`."""
        return self.limit * whole if self.is_share else self.limit


@dataclass
class CostModel:
    """What records take of a resource; records differ in channels only.

    Attributes:
        settings: any of them.
        resource: which.
        about: of a detector's file, whose bytes are part of it.
        measure: seconds of a network; None: `median_seconds`. Tests replace it.
    """

    settings: SSDSettings
    resource: Resource
    about: Mapping[str, Any] = field(default_factory=dict)
    measure: Callable[[SSD], float] | None = None
    _known: dict[tuple[tuple[str, int], ...], float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.table = CostTable.of(self.settings)

    def cost(self, channels: Channels) -> float:
        """Of a record; measured and written only once for each."""
        if self.resource == "macs":
            return self.table.macs(channels)
        key = tuple(sorted(channels.items()))
        if key not in self._known:
            network = SSD(self.settings.with_channels(channels)).eval()
            measure = self.measure or median_seconds
            is_bytes = self.resource == "bytes"
            self._known[key] = len(file_bytes(network, self.about)) if is_bytes else measure(network)
        return self._known[key]

    def approximate(self, channels: Channels) -> float:
        """A stand-in that is quick and rises with each group: parameters for bytes, else MACs."""
        if self.resource == "bytes":
            return self.table.num_parameters(channels)
        return self.table.macs(channels)

    def describe(self, cost: float) -> str:
        """For people."""
        if self.resource == "latency":
            return f"{1e3 * cost:.2f} ms"
        if self.resource == "bytes":
            return f"{cost / 1e3:,.0f} KB"
        return f"{cost / 1e6:.1f} M MACs" if cost >= 1e5 else f"{cost:,.0f} MACs"


@torch.no_grad()
def median_seconds(network: SSD, rounds: int = _ROUNDS) -> float:
    """Median time from one input to its boxes and scores, norms folded; with one thread the thread's own
    time, which leaves out what other processes take.
    """
    fold_norms(network)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    image = torch.zeros(1, 3, network.settings.height, network.settings.width, dtype=torch.uint8)
    samples = []
    for number in range(rounds + 3):
        started = clock()
        network.boxes_and_scores(image)
        if number >= 3:
            samples.append(clock() - started)
    return statistics.median(samples)
