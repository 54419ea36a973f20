"""Deletion: extra layers and heads lose a fixed share of their inner channels.

arXiv 1905.01787 names "fixed channel deletion" in the branch layers; only its abstract is public, so this is
our reading: one factor for all inner channels of extra layers and heads. The channels with the highest scores
stay, as initialisation; outputs for classes and boxes are untouched.
"""

from __future__ import annotations

from torch import Tensor

from modicum.errors import InputError
from modicum.vision.detect.backbone import ROUND_TO
from modicum.vision.detect.pruning.channel_graph import kept_network
from modicum.vision.detect.pruning.channel_scores import channel_scores
from modicum.vision.detect.ssd import SSD


def delete_branch_channels(network: SSD, factor: float) -> SSD:
    """A copy with `factor` of the channels of extra layers and heads, as multiples of 8, at least 8.

    Raises:
        InputError: the factor is not above 0 and at most 1.
        ModelError: the network cannot be pruned.
    """
    if not 0 < factor <= 1:
        raise InputError(f"the factor of the branches is {factor}: give a number above 0 and at most 1")
    scores = channel_scores(network, "magnitude")
    kept = {}
    for group in network.settings.branch_groups:
        count = len(scores[group])
        stays = min(count, max(ROUND_TO, round(count * factor / ROUND_TO) * ROUND_TO))
        kept[group] = highest(scores[group], stays)
    return kept_network(network, kept)


def highest(scores: Tensor, count: int) -> Tensor:
    """The numbers of the channels with the highest scores, in their order; of equal scores the first."""
    return scores.argsort(dim=0, descending=True, stable=True)[:count].sort().values
