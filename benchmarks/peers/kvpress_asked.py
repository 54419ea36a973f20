"""kvpress, many questions on one context: a context is read in one call under the press.

    .venv-kvpress/bin/python benchmarks/peers/kvpress_asked.py JOB.json > results.jsonl

Presses such as KVzipPress only mask what they evict: the bytes are those of the tokens that are not masked.
"""

from __future__ import annotations

from typing import Any

import transformers
from asked import main
from kvpress_eval import load, make_press
from measure import take


def compress(model: Any, ids: list[int], method: str, share: float) -> tuple[Any, int, int]:
    """A cache under the press of that name."""
    n = len(ids)
    for block in model.model.layers:
        block.self_attn.masked_key_indices = None
    kept = transformers.DynamicCache()
    with make_press(method, 1 - (int(share * n) + 1e-6) / n)(model):
        take(model, kept, ids, 0, body=True)
    token = sum(x[0, 0, 0].numel() * x.element_size() for x in (kept.layers[0].keys, kept.layers[0].values))
    heads = len(kept.layers) * kept.layers[0].keys.shape[1]
    return kept, round(share * n) * token * heads, n * token * heads


if __name__ == "__main__":
    main(load, compress)
