"""kvpress, many questions on one context: each context is compressed once, then every question is asked of a
copy. Run by benchmarks/experiments/budgets.py in kvpress' own environment.

    .venv-kvpress/bin/python benchmarks/peers/kvpress_asked.py JOB.json > results.jsonl

JOB.json: model (a folder), dtype, presses, shares, contexts (token ids, and questions with their answers'
ids). Contexts are read in one call under the press. Presses such as KVzipPress only mask what they evict:
then the bytes are of what is not masked.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from kvpress_eval import attended, load, make_press
from measure import take


def right(model: Any, kept: Any, start: int, question: list[int], answer: list[int]) -> tuple[bool, float]:
    """Whether each of the answer's tokens ranks first, given those before it, and the share that do."""
    ids = question + answer
    where = torch.arange(start, start + len(ids))[None]
    logits = model(
        input_ids=torch.tensor([ids]),
        position_ids=where,
        past_key_values=kept,
        use_cache=True,
        logits_to_keep=len(answer) + 1,
    ).logits[0, :-1]
    hits = (logits.argmax(-1) == torch.tensor(answer)).tolist()
    return all(hits), sum(hits) / len(hits)


def main() -> None:
    """Print a line for each press, share and context."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    model = load(job["model"], job["dtype"])
    wanted = [(press, share) for press in job["presses"] for share in job["shares"]]
    for number, context in enumerate(job["contexts"]):
        n = len(context["ids"])
        for name, share in wanted:
            for block in model.model.layers:
                block.self_attn.masked_key_indices = None
            torch.manual_seed(0)  # CompactorPress draws a sketch
            kept = transformers.DynamicCache()
            with torch.no_grad(), make_press(name, 1 - (int(share * n) + 1e-6) / n)(model):
                take(model, kept, context["ids"], 0, body=True)
            told: list[tuple[bool, float]] = []
            with torch.no_grad():
                for question in context["questions"]:
                    told.append(right(model, copy.deepcopy(kept), n, question["ids"], question["answer"]))
            token = sum(
                x[0, 0, 0].numel() * x.element_size() for x in (kept.layers[0].keys, kept.layers[0].values)
            )
            low, high = attended(model, kept)
            result = {
                "context": number,
                "press": name,
                "share": share,
                "right": sum(whole for whole, _ in told),
                "tokens": sum(part for _, part in told) / len(told),
                "nbytes": round(share * n) * token * len(kept.layers) * kept.layers[0].keys.shape[1],
                "full_nbytes": n * token * len(kept.layers) * kept.layers[0].keys.shape[1],
                "held": [low, high],
            }
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
