"""References for distillation: plain loops in Python's floats (float64), written from the formulas alone."""

from __future__ import annotations

import math
from collections.abc import Sequence


def softmax(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    top = max(logits)
    powers = [math.exp((z - top) / temperature) for z in logits]
    total = math.fsum(powers)
    return [x / total for x in powers]


def kept(probabilities: Sequence[float], rule: str, value: float) -> list[int]:
    """Classes kept, most probable first."""
    order = sorted(range(len(probabilities)), key=lambda c: -probabilities[c])
    if rule == "topk":
        return order[: int(value)]
    if rule == "threshold":
        return [c for c in order if probabilities[c] >= value] or order[:1]
    found: list[int] = []
    for c in order:
        found.append(c)
        if math.fsum(probabilities[x] for x in found) >= value:
            break
    return found


def loss(
    logits: Sequence[float],
    target: dict[int, float],
    tail: float,
    label: int,
    hard_weight: float,
    temperature: float,
) -> float:
    """λ · CE(y, softmax(z)) + (1 - λ) · τ² · (-Σ q log softmax(z/τ) - tail · log Σ of other classes)."""
    hard = -math.log(softmax(logits)[label])
    student = softmax(logits, temperature)
    soft = -math.fsum(q * math.log(student[c]) for c, q in target.items())
    if tail:
        soft -= tail * math.log(math.fsum(p for c, p in enumerate(student) if c not in target))
    return hard_weight * hard + (1 - hard_weight) * temperature**2 * soft


def gradient(
    logits: Sequence[float], target: dict[int, float], label: int, hard_weight: float
) -> list[float]:
    """softmax(z) - r of one mixed target r, for τ = 1 and a target that sums to 1."""
    mixed = [(1 - hard_weight) * target.get(c, 0.0) for c in range(len(logits))]
    mixed[label] += hard_weight
    return [p - r for p, r in zip(softmax(logits), mixed, strict=True)]


def ctc(probabilities: Sequence[Sequence[float]], labels: Sequence[int], blank: int) -> float:
    """-log of the sum over all paths, by the forward recursion of Graves et al. 2006: [T][C]."""
    extended = [blank]
    for label in labels:
        extended += [label, blank]
    alpha = [0.0] * len(extended)
    alpha[0] = probabilities[0][blank]
    if len(extended) > 1:
        alpha[1] = probabilities[0][extended[1]]
    for row in probabilities[1:]:
        following = []
        for s, label in enumerate(extended):
            total = alpha[s] + (alpha[s - 1] if s else 0.0)
            if s > 1 and label not in (blank, extended[s - 2]):
                total += alpha[s - 2]
            following.append(total * row[label])
        alpha = following
    return -math.log(alpha[-1] + (alpha[-2] if len(alpha) > 1 else 0.0))


def near_spikes(best: Sequence[int], length: int, blank: int, neighbours: int) -> list[bool]:
    """Frames with a frame that is not blank at most `neighbours` away, within the length."""
    return [
        t < length
        and any(best[s] != blank for s in range(max(0, t - neighbours), min(length, t + neighbours + 1)))
        for t in range(len(best))
    ]
