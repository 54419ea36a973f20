"""Peak memory of a fresh process that answers one prompt; prints JSON. Run by kv_cpu.py."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import fresh
import torch
from machine import peak_memory
from subject import Numbers, Settings, as_text, random_ids, random_model

import modicum

FULL = "DynamicCache"
"""In the place of a policy: transformers' own generate and cache."""
_ANSWER = 16


def in_fresh_process(policy: str, tokens: int, settings: Settings) -> dict[str, Any]:
    """What `measure` finds, in a process of its own."""
    given = {**vars(settings), "policy": policy, "tokens": tokens}
    names = ("policy", "tokens", "budget", "chunk", "threads", "seed")
    return fresh.answer(Path(__file__).name, [f"--{name}={given[name]}" for name in names])


def measure(policy: str, tokens: int, settings: Settings) -> dict[str, Any]:
    """Answer a prompt of `tokens` random tokens; what that took in memory and time."""
    torch.set_num_threads(settings.threads)
    model = random_model(settings.seed)
    ids = random_ids(tokens, settings.seed)
    before = peak_memory()
    start = time.perf_counter()
    if policy == FULL:
        model.generate(ids, max_new_tokens=_ANSWER, do_sample=False)
    else:
        modicum.generate(
            model,
            Numbers(),
            as_text(ids),
            policy=policy,
            budget=settings.budget,
            chunk=settings.chunk,
            max_new_tokens=_ANSWER,
            stop_on_eos=False,
        )
    seconds = time.perf_counter() - start
    return {
        "policy": policy,
        "tokens": tokens,
        "loaded": before,
        "peak": peak_memory(),
        "seconds": seconds,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", required=True)
    for name in ("tokens", "budget", "chunk", "threads", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    asked = parser.parse_args()
    chosen = Settings(budget=asked.budget, chunk=asked.chunk, threads=asked.threads, seed=asked.seed)
    print(json.dumps(measure(asked.policy, asked.tokens, chosen)))
