"""What a peer of pruning is given and what it tells; it runs in its own environment, without modicum."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def peak() -> int:
    """Most bytes that this process has had resident."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


@torch.no_grad()
def perplexity(model: Any, ids: torch.Tensor) -> float:
    """exp of the mean loss of each token but the first, sequence by sequence."""
    total, count = 0.0, 0
    for row in ids:
        logits = model(row[None], use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
        count += len(row) - 1
    return math.exp(total / count)


def linears(model: Any) -> list[tuple[str, torch.nn.Linear]]:
    """The linear layers of the decoder blocks, by their names."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            found.append((name, module))
    return found


Pruner = Callable[[Any, torch.Tensor, str, str], None]
"""Prunes a model in place: model, ids [n, T], method, amount ("0.6" or "2:4")."""


def main(prune: Pruner) -> None:
    """Load, prune, and print what came of it as a line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--ids", required=True, help="safetensors: calibration [n, T] and held [m, T]")
    parser.add_argument("--method", required=True)
    parser.add_argument("--amount", required=True)
    asked = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    tensors = load_file(asked.ids)
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32)
    model.train(False)
    model(tensors["held"][:1])
    before = peak()
    start = time.perf_counter()
    prune(model, tensors["calibration"], asked.method, asked.amount)
    seconds = time.perf_counter() - start
    most = peak()
    gone = sum(int((module.weight == 0).sum()) for _, module in linears(model))
    total = sum(module.weight.numel() for _, module in linears(model))
    told = {"perplexity": perplexity(model, tensors["held"]), "seconds": seconds}
    told |= {"peak": most - before, "resident": most, "sparsity": gone / total}
    print(json.dumps(told))
