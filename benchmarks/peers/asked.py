"""Asked: many questions on one context. Each context is compressed once, then every question is asked of a
copy. Shared by kvpress_asked.py and transformers_asked.py, which benchmarks/experiments/budgets.py runs in
their own environments.

JOB.json: model (a folder), dtype, methods, shares, contexts (token ids, and questions with their answers'
ids).
"""

from __future__ import annotations

import copy
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Compress = Callable[[Any, list[int], str, float], tuple[Any, int, int]]
"""(model, ids, method, share) -> a cache, its bytes, and a full cache's in 16 bits."""


def right(model: Any, kept: Any, start: int, question: list[int], answer: list[int]) -> tuple[bool, float]:
    """Whether each of the answer's tokens ranks first, given those before it, and the share that do."""
    ids = question + answer
    where = torch.arange(start, start + len(ids))[None]
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    logits = model(
        input_ids=torch.tensor([ids]),
        position_ids=where,
        use_cache=True,
        logits_to_keep=len(answer) + 1,
        **{name: kept},
    ).logits[0, :-1]
    hits = (logits.argmax(-1) == torch.tensor(answer)).tolist()
    return all(hits), sum(hits) / len(hits)


def copied(kept: Any) -> Any:
    """A cache that can grow apart from this one: an update puts new tensors into a layer, and changes none.

    Not a deep copy, which quantised tensors refuse.
    """
    twin = copy.copy(kept)
    twin.layers = [copy.copy(layer) for layer in kept.layers]
    return twin


def main(load: Callable[[str, str], Any], compress: Compress) -> None:
    """Print a line for each method, share and context of the job in argv."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    model = load(job["model"], job["dtype"])
    for number, context in enumerate(job["contexts"]):
        for method in job["methods"]:
            for share in job["shares"]:
                torch.manual_seed(0)  # kvpress' CompactorPress draws a sketch
                with torch.no_grad():
                    kept, nbytes, full = compress(model, context["ids"], method, share)
                    told = [
                        right(
                            model,
                            copied(kept),
                            len(context["ids"]),
                            question["ids"],
                            question["answer"],
                        )
                        for question in context["questions"]
                    ]
                result = {
                    "context": number,
                    "method": method,
                    "share": share,
                    "right": sum(whole for whole, _ in told),
                    "tokens": sum(part for _, part in told) / len(told),
                    "nbytes": nbytes,
                    "full_nbytes": full,
                }
                print(json.dumps(result), flush=True)
