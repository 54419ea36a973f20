"""Where a head should look: at the token that an answer copies.

Numbers that hold the same few digits are told apart only by whose they are. The layers before know that, but
no head came to look for it by itself: what is lost for an answer's few doubtful digits hardly reaches the
queries and keys. So a few heads are told (in the spirit of Deshpande and Narasimhan 2020, "Guiding
attention for self-supervised learning with transformers"): part of the loss is -log of their attention to
the token that is to be said next, wherever the answer's words stood before. What the heads write, and how,
is left to the training.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

_LEAST = 3  # tokens that must be the same before they are taken for a copy


def sources(ids: list[int], marks: list[int]) -> list[tuple[int, list[int]]]:
    """Answers' places, each with the earlier places of the token that stands there.

    An answer is cut into the longest pieces that occur before it. Takes the ids and marks of a `Sequence`.
    """
    index: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for at in range(len(ids) - _LEAST + 1):
        index[tuple(ids[at : at + _LEAST])].append(at)
    found: list[tuple[int, list[int]]] = []
    start = 0
    while start < len(ids):
        if marks[start] < 1:
            start += 1
            continue
        end = start
        while end < len(ids) and marks[end] > 0:
            end += 1
        while start < end:
            size, places = _longest(ids, start, end, index)
            found += [(start + i, [place + i for place in places]) for i in range(size)]
            start += max(size, 1)
    return found


def _longest(
    ids: list[int], start: int, end: int, index: dict[tuple[int, ...], list[int]]
) -> tuple[int, list[int]]:
    """The most tokens from `start`, before `end`, that occur before it too, and where they begin there."""
    most = 0
    places: list[int] = []
    if start + _LEAST > end:
        return most, places
    for place in index[tuple(ids[start : start + _LEAST])]:
        if place + _LEAST > start:
            break  # the places rise
        size = _LEAST
        while start + size < end and place + size < start and ids[place + size] == ids[start + size]:
            size += 1
        if size > most:
            most, places = size, []
        if size == most:
            places.append(place)
    return most, places


def looks(
    query: Tensor, key: Tensor, told: list[list[tuple[int, list[int]]]], weights: list[list[float]]
) -> tuple[Tensor, float]:
    """The weighted sum of -log of the attention paid to the told places, and the sum of the weights.

    Args:
        query: [B, H, N, d], turned; the query at n says the token at n + 1.
        key: [B, H, N, d], turned.
        told: of each sequence, what `sources` gives.
        weights: of each sequence's tokens, for what stands there.
    """
    total = query.new_zeros(())
    whole = 0.0
    length = query.shape[2]
    for row, (places, weigh) in enumerate(zip(told, weights, strict=True)):
        kept = [(at - 1, before) for at, before in places if at <= length]
        if not kept:
            continue
        at = torch.tensor([place for place, _ in kept])
        scores = query[row][:, at] @ key[row].transpose(-1, -2) * query.shape[-1] ** -0.5  # [H, M, N]
        hidden = torch.arange(length) > at[:, None]
        scores = scores.masked_fill(hidden, -torch.inf)
        good = torch.zeros(len(kept), length, dtype=torch.bool)
        rows = [i for i, (_, before) in enumerate(kept) for _ in before]
        good[rows, [place for _, before in kept for place in before]] = True
        aimed = scores.masked_fill(~good, -torch.inf).logsumexp(-1)
        worth = torch.tensor([weigh[place + 1] for place, _ in kept], dtype=query.dtype)
        total = total + ((scores.logsumexp(-1) - aimed).mean(0) * worth).sum()
        whole += float(worth.sum())
    return total, whole
