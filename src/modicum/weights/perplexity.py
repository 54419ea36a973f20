"""Perplexity: how well a model reads a text."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: Tensor) -> float:
    """exp of the mean negative log-likelihood of each token but the first: ids [n, T], row by row."""
    total, count = 0.0, 0
    device = next(model.parameters()).device
    for row in ids:
        logits = model(row[None].to(device), use_cache=False).logits[0, :-1].float()
        goal = row[1:].to(device)
        total += float(torch.nn.functional.cross_entropy(logits, goal, reduction="sum"))
        count += len(goal)
    return math.exp(total / count)
