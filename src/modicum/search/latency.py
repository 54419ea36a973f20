"""Latency of a space's networks: the sum of its blocks' times in a table, checked end to end."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from modicum.measure.block_table import BlockTable, TimedBlock
from modicum.measure.runtimes import Runtime
from modicum.measure.timing import Spread, TimingSettings, interleaved
from modicum.search.predictor import kendall_tau
from modicum.search.space import Picks, ReferenceBlock, SearchSpace


def _digest(module: nn.Module) -> str:
    return hashlib.sha256(repr(module).encode()).hexdigest()[:8]


def block_key(space: SearchSpace, number: int, pick: int) -> str:
    """Of a variant in a table: its shapes and its name; searches with blocks of the same shapes share it."""
    variant, site = space.variants[number][pick], space.sites[number]
    name = variant.name
    if isinstance(variant, ReferenceBlock):
        name = f"reference-{_digest(space.reference.blocks[number])}"
    return f"{site.key}/{name}"


def ends_keys(space: SearchSpace) -> tuple[str, str]:
    """Of stem and head, which all networks share."""
    shapes = tuple("x".join(map(str, shape)) for shape in _ends_shapes(space))
    return (
        f"{shapes[0]}/stem-{_digest(space.reference.stem)}",
        f"{shapes[1]}/head-{_digest(space.reference.head)}",
    )


def _ends_shapes(space: SearchSpace) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(space.example.shape[1:]), space.sites[-1].output_shape


def timed_blocks(space: SearchSpace) -> list[TimedBlock]:
    """All that must be in a table: stem, head, every variant of every block; no two with the same key."""
    reference, keys, shapes = space.reference, ends_keys(space), _ends_shapes(space)
    found = {
        keys[0]: TimedBlock(keys[0], lambda: reference.stem, shapes[0]),
        keys[1]: TimedBlock(keys[1], lambda: reference.head, shapes[1]),
    }
    for number, own in enumerate(space.variants):
        for pick, variant in enumerate(own):
            key = block_key(space, number, pick)

            def build(number: int = number, variant: object = variant) -> nn.Module:
                return space.block(number, variant)  # type: ignore[arg-type]  # a default binds it

            found.setdefault(key, TimedBlock(key, build, space.sites[number].input_shape))
    return list(found.values())


def block_seconds(space: SearchSpace, table: BlockTable) -> list[list[float]]:
    """For each block the seconds of its variants.

    Raises:
        InputError: the table lacks a block.
    """
    return [
        [table[block_key(space, number, pick)] for pick in range(len(own))]
        for number, own in enumerate(space.variants)
    ]


def network_seconds(space: SearchSpace, table: BlockTable, picks: Picks) -> float:
    """The predicted time of a network: stem, blocks and head.

    Raises:
        InputError: the table lacks a block.
    """
    keys = [block_key(space, number, pick) for number, pick in enumerate(picks)]
    return table.total([*ends_keys(space), *keys])


@dataclass(frozen=True)
class LatencyCheck:
    """Sums of block times beside times end to end.

    Attributes:
        predicted: seconds of each network, from the table.
        measured: seconds of each network.
    """

    predicted: tuple[float, ...]
    measured: tuple[float, ...]

    @property
    def kendall_tau(self) -> float:
        """Whether the sums rank the networks as the times do."""
        return kendall_tau(self.predicted, self.measured)

    @property
    def ratio(self) -> Spread:
        """Measured to predicted: median and quartiles."""
        return Spread.of([m / p for m, p in zip(self.measured, self.predicted, strict=True)])


def measure_networks(
    networks: Sequence[nn.Module],
    shape: Sequence[int],
    runtime: Runtime,
    timing: TimingSettings | None = None,
) -> list[Spread]:
    """Seconds of whole networks for an input of this shape (without the batch), measured in turn."""
    timing = timing or TimingSettings(rounds=15, sample_seconds=0.01)
    clock = time.thread_time if runtime.threads == 1 else time.perf_counter
    with runtime.active():
        runs = {str(i): runtime.prepare(network, shape) for i, network in enumerate(networks)}
        return [Spread.of(samples) for samples in interleaved(runs, timing, clock).values()]


def check_latency(
    space: SearchSpace, table: BlockTable, runtime: Runtime, networks: Sequence[Picks]
) -> LatencyCheck:
    """Measure assembled networks (with fresh weights) end to end beside what the table predicts.

    Raises:
        InputError: the table lacks a block.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = [space.assemble(picks, {}) for picks in networks]
    measured = measure_networks(built, space.example.shape[1:], runtime)
    return LatencyCheck(
        tuple(network_seconds(space, table, picks) for picks in networks),
        tuple(spread.median for spread in measured),
    )
