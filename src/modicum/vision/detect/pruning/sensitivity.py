"""Sensitivity: what pruning a group alone does to the outputs, and the best choice for all groups together.

Our design. For each group and some numbers of channels, the lowest-scored channels are switched off and the
noise-to-signal ratio of the heads' outputs is measured (see `modicum.search.noise`), averaged over outputs.
A switched-off channel is one whose norms have γ = β = 0 wherever it is written, which gives what cutting it
gives. Then one number of channels is chosen for each group, so that the sum of ratios is least within the
budget, by the exact knapsack of `modicum.search.milp`. Its costs are additive and a network's are not (a
convolution costs inputs · outputs), so each option costs what the group alone saves, and the knapsack's limit
is lowered until the chosen record keeps the budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from modicum.search.milp import Option, UnreachableError, choose
from modicum.search.noise import ErrorSums
from modicum.vision.detect.backbone import ROUND_TO
from modicum.vision.detect.conv_norm import ConvNorm
from modicum.vision.detect.loaded_images import Progress
from modicum.vision.detect.pruning.greedy import Allocation
from modicum.vision.detect.ssd import SSD

_SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
"""Of a group's channels, that are cut, as far as may be."""
_HALVINGS = 24

Ratios = dict[str, dict[int, float]]
"""Of each group: channels that stay, and the noise-to-signal ratio of the outputs then."""


@torch.no_grad()
def sensitivities(
    network: SSD,
    allocation: Allocation,
    scores: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    progress: Progress | None = None,
) -> Ratios:
    """Measure all groups of `allocation.least`.

    Args:
        scores: of `channel_scores`; the lowest go.
        inputs: images [B, 3, H, W], 0 to 255.
    """
    network = network.eval()
    expected = [network.raw_outputs(batch) for batch in inputs]
    found: Ratios = {}
    tell = progress or (lambda *_: None)
    for number, (group, least) in enumerate(allocation.least.items()):
        count = allocation.channels[group]
        found[group] = {count: 0.0}
        order = scores[group].argsort(dim=0, stable=True)
        for stays in _counts(count, least):
            with switched_off(network, group, order[: count - stays]):
                found[group][stays] = _output_noise(network, inputs, expected)
        tell("measuring sensitivity", number + 1, len(allocation.least))
    return found


def knapsack_channels(allocation: Allocation, ratios: Ratios, limit: float) -> dict[str, int]:
    """Channels of all groups with the least sum of ratios within the limit.

    Raises:
        InputError: the smallest network does not fit.
    """
    allocation.check(limit)
    model, full = allocation.model, dict(allocation.channels)
    if model.cost(full) <= limit:
        return full
    groups = list(ratios)
    whole = model.approximate(full)
    saved = {
        g: {n: int(whole - model.approximate({**full, g: n})) for n in counts} for g, counts in ratios.items()
    }
    options = [[Option(ratios[g][n], {"kept": -saved[g][n]}) for n in ratios[g]] for g in groups]
    most = sum(max(saved[g].values()) for g in groups)
    best = allocation.smallest()
    low, high = 0.0, float(most)  # to be saved: too little, enough
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        try:
            choice = choose(options, {"kept": -middle})
        except UnreachableError:
            high = middle
            continue
        channels = full | {g: list(ratios[g])[pick] for g, pick in zip(groups, choice.picks, strict=True)}
        if model.cost(channels) <= limit:
            best, high = channels, middle
        else:
            low = middle
        if high - low < whole * 1e-3:
            break
    return best


@contextmanager
def switched_off(network: SSD, group: str, channels: Tensor) -> Iterator[None]:
    """Some channels of a group are 0 while it is open."""
    saved = []
    for module in network.modules():
        if isinstance(module, ConvNorm) and module.outputs == group:
            for parameter in module.norm.parameters():
                saved.append((parameter, parameter.data.clone()))
                parameter.data[channels] = 0
    try:
        yield
    finally:
        for parameter, value in saved:
            parameter.data.copy_(value)


def _counts(count: int, least: int) -> list[int]:
    """Numbers of channels that may stay, fewer than all, falling; multiples of 8 and the least."""
    wanted = {max(least, round(count * (1 - share) / ROUND_TO) * ROUND_TO) for share in _SHARES} | {least}
    return sorted((n for n in wanted if n < count), reverse=True)


def _output_noise(network: SSD, inputs: Sequence[Tensor], expected: Sequence[Sequence[Tensor]]) -> float:
    sums = [ErrorSums(output.shape[1]) for output in expected[0]]
    for batch, wanted in zip(inputs, expected, strict=True):
        for one, ours, theirs in zip(sums, network.raw_outputs(batch), wanted, strict=True):
            one.add(theirs, ours)
    return sum(one.value for one in sums) / len(sums)
