"""Likelihood: how probable a model under a budget holds a text that follows what it has read."""

from __future__ import annotations

import torch
from torch import Tensor

from modicum.compat import cache_kwargs
from modicum.generation.reader import Reader
from modicum.kv.call import cuts


@torch.no_grad()
def log_likelihoods(reader: Reader, target: list[int]) -> tuple[Tensor, Tensor]:
    """Of each token of the target, given all before it: its log-probability in nats [n] fp64, and whether it
    is the likeliest [n] bool. Read chunk by chunk; the last token is not read.
    """
    cache = reader.cache
    assert reader.transcript.logits is not None
    wanted = torch.tensor(target, device=reader.device)
    found = [_of(reader.transcript.logits, wanted[:1])]
    for a, b in cuts(len(target) - 1, cache.budget.chunk):
        out = reader.model(
            input_ids=wanted[None, a:b], **cache_kwargs(reader.model, cache), use_cache=True, return_dict=True
        )
        found.append(_of(out.logits[0], wanted[a + 1 : b + 1]))
    return torch.cat([p for p, _ in found]), torch.cat([best for _, best in found])


def _of(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    rows = logits.float().log_softmax(-1)
    return rows.gather(1, wanted[:, None])[:, 0].double(), rows.argmax(-1) == wanted
