"""A stream far longer than the model's positions, under a budget, with positions original and renumbered.

One command: python benchmarks/experiments/endless.py [--model reference] [--out DIR] [--quick]
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import common
import torch
from torch import Tensor
from torch.nn import functional as F

from modicum import BudgetCache
from modicum.compat import cache_kwargs
from modicum.kv.turning import NUMBERINGS


@dataclass(frozen=True)
class Settings:
    """Sizes; nothing is drawn."""

    passes: int = 8
    """How often the text is read, one after the other: some 35,800 tokens each on the reference model."""
    length: int | None = None
    """Tokens of the text that are read; None for all."""
    budget: int = 1_024
    chunk: int = 512
    policies: tuple[str, ...] = ("streamingllm", "keydiff", "snapkv", "auto")
    decode: int = 64
    """Tokens fed one at a time at the end, for what a step costs."""


QUICK = Settings(passes=3, length=3_000, budget=256, chunk=128, policies=("streamingllm", "keydiff"))


@torch.no_grad()
def feed(model: Any, cache: BudgetCache, ids: Tensor, s: Settings) -> dict[str, Any]:
    """Read a stream: the mean loss of each pass in nats a token, what is held, and what it takes."""
    losses: list[float] = []
    held: list[int] = []
    before = model.get_output_embeddings().weight.new_zeros(0)
    seconds, given = [], cache_kwargs(model, cache)
    for start in range(0, len(ids), s.chunk):
        part = ids[start : start + s.chunk]
        began = time.process_time()
        at = torch.arange(start, start + len(part))[None]
        logits = model(part[None], **given, position_ids=at, use_cache=True).logits[0]
        seconds.append(time.process_time() - began)
        told = torch.cat([before, logits[:-1]]) if len(before) else logits[:-1]
        losses += F.cross_entropy(told.float(), part[-len(told) :], reduction="none").tolist()
        before = logits[-1:]
        held.append(cache.nbytes)
    cache.check_integrity()
    steps = []
    for i in range(s.decode):
        at = torch.tensor([[len(ids) + i]])
        began = time.process_time()
        model(ids[i : i + 1][None], **given, position_ids=at, use_cache=True)
        steps.append(time.process_time() - began)
    length = len(ids) // s.passes
    passes = [losses[i * length : (i + 1) * length] for i in range(s.passes)]
    return {
        "loss": [sum(part) / len(part) for part in passes],
        "held": [min(held[-len(held) // 2 :]), max(held)],
        "budget": cache.budget_nbytes,
        "peak": cache.peak_nbytes,
        "full": cache.full_nbytes,
        "prefill_seconds": sum(seconds),
        "step_ms": 1000 * sorted(steps)[len(steps) // 2],
    }


def run(asked: common.Options, s: Settings) -> dict[str, Any]:
    """Every policy with both kinds of positions; the raw results, ready for JSON."""
    model, tokenizer = common.load(asked.model)
    ids = common.running_text(tokenizer, 1, s.length or 10**9)[0].repeat(s.passes)
    spent: dict[str, float] = {}
    rows = []
    for policy in s.policies:
        for positions in NUMBERINGS:
            with common.timed(f"{policy}, {positions}", spent):
                cache = BudgetCache(model, policy, s.budget, chunk=s.chunk, positions=positions)
                rows.append({"policy": policy, "positions": positions, **feed(model, cache, ids, s)})
    return {
        "model": common.name_of(model),
        "trained": model.config.max_position_embeddings,
        "tokens": len(ids),
        "settings": asdict(s),
        "seconds": spent,
        "rows": rows,
    }


def draw(results: dict[str, Any]) -> Any:
    """Loss along the stream."""
    import matplotlib.pyplot as plt

    s = results["settings"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for axis, positions in zip(axes, NUMBERINGS, strict=True):
        for row in results["rows"]:
            if row["positions"] != positions:
                continue
            at = [results["tokens"] * (i + 1) / s["passes"] / 1000 for i in range(s["passes"])]
            colour = common.COLOURS.get(row["policy"], "#000000")
            axis.plot(at, row["loss"], marker=".", label=row["policy"], color=colour, lw=1.5)
        axis.axvline(results["trained"] / 1000, color="grey", lw=0.8, ls=":")
        axis.set(title=f"{positions} positions", xlabel="thousands of tokens read")
    axes[0].set_ylabel("loss, nats a token")
    axes[0].legend(fontsize=8)
    return figure


def section(results: dict[str, Any]) -> str:
    """The tables."""
    s = results["settings"]
    head = ["policy and positions", "first pass", "second", "last", "last − first"]
    head += ["MiB held, at most", "budget", "a full cache", "prefill, s", "a step, ms"]
    rows = []
    for row in results["rows"]:
        loss = row["loss"]
        rows.append(
            [
                f"`{row['policy']}`, {row['positions']}",
                *(f"{loss[i]:.3f}" for i in (0, 1, -1)),
                f"{loss[-1] - loss[0]:+.3f}",
                *(common.mib(n) for n in (row["held"][1], row["budget"], row["full"])),
                f"{row['prefill_seconds']:.1f}",
                f"{row['step_ms']:.1f}",
            ]
        )
    return (
        f"{results['tokens']:,} tokens: the text {s['passes']} times, in chunks of {s['chunk']}, budget "
        f"{s['budget']:,}. The model was trained on positions up to {results['trained']:,} (dotted). Loss in "
        f"nats a token, mean of a pass; then {s['decode']} tokens one at a time, the median.\n\n"
        + common.table(head, rows)
        + "\n\n![Loss along the stream](endless.png)"
    )


def main() -> None:
    asked = common.options(__doc__)
    results = run(asked, QUICK if asked.quick else Settings())
    common.paint(asked.out and asked.out / "endless.png", lambda: draw(results))
    common.publish("endless", asked, results, section(results))


if __name__ == "__main__":
    main()
