"""transformers' quantised caches, many questions on one context: no token is evicted.

.venv-transformers/bin/python benchmarks/peers/transformers_asked.py JOB.json > results.jsonl
"""

from __future__ import annotations

from typing import Any

from asked import main
from job import Ask, Setting
from measure import Watch, take
from transformers_eval import load, make_cache


def compress(model: Any, ids: list[int], method: str, share: float) -> tuple[Any, int, int]:
    """A quantised cache; its bytes are counted from live storage, and its residual is part of them."""
    asked = Ask(key="", context=ids, question=[], most=0)
    kept = make_cache(model, asked, Setting(policy=method, budget="full"))
    take(model, kept, ids, 0, body=True)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    full = 2 * 2 * len(ids) * config.num_hidden_layers * config.num_key_value_heads * head_dim
    return kept, Watch(kept, model).now(), full


if __name__ == "__main__":
    main(load, compress)
