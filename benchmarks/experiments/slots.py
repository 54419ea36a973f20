"""Slots in 8 bits: their error by layer, accuracy at equal bytes, and what a decode step takes.

One command: python benchmarks/experiments/slots.py [--model reference] [--out DIR] [--quick]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import common
import replay
import torch
from asking import Context, ask
from torch import Tensor
from torch.nn import functional as F
from which import Settings as Uses
from which import many_questions

import modicum
from modicum import BudgetCache
from modicum.compat import cache_kwargs
from modicum.kv.codec import Codec
from modicum.kv.store import Store
from modicum.kv.turning import NUMBERINGS
from modicum.report.style import byte_axis

STORES = ("model", "int8", "fp8")


@dataclass(frozen=True)
class Settings:
    """Sizes; seeds are fixed."""

    texts: int = 12
    text_length: int = 576
    first: int = 128
    """Tokens from which the channels' sizes are taken, where keys are scaled by channel too."""
    length: int = 1024
    contexts: int = 16
    chunk: int = 256
    shares: tuple[float, ...] = (0.07, 0.1, 0.15, 0.25, 0.5)
    """Budgets, as shares of the bytes of a full cache in 16 bits."""
    policies: tuple[str, ...] = ("auto", "manifoldkv", "keydiff")
    budget: int = 1024
    steps: int = 96
    """Decode steps that are timed, in turns."""


QUICK = Settings(
    texts=3, text_length=256, length=512, contexts=4, shares=(0.25,), policies=("auto",), steps=8
)


# ------------------------------------------------------------------ error by layer


def forms(first: int) -> dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    """What becomes of keys and of values [B, H, n, D] in each form."""

    def coded(name: str) -> Callable[[Tensor], Tensor]:
        codec = Codec(name)
        return lambda x: codec.decode(codec.encode(x), x.dtype)

    def by_channel(name: str) -> Callable[[Tensor], Tensor]:
        """Each channel divided by its largest number among the first tokens, then as before."""

        def form(x: Tensor) -> Tensor:
            size = x[:, :, :first].abs().amax(2, keepdim=True).clamp_min(1e-6)
            return coded(name)(x / size) * size

        return form

    half: Callable[[Tensor], Tensor] = lambda x: x.to(torch.bfloat16).to(x.dtype)  # noqa: E731
    return {
        "bfloat16": (half, half),
        "int8": (coded("int8"), coded("int8")),
        "int8, keys by channel too": (by_channel("int8"), coded("int8")),
        "fp8": (coded("fp8"), coded("fp8")),
        "fp8, keys by channel too": (by_channel("fp8"), coded("fp8")),
    }


@torch.no_grad()
def errors(model: Any, texts: dict[str, Tensor], s: Settings) -> list[dict[str, Any]]:
    """Relative error of each layer's attention output, from identical inputs in float32."""
    rows = []
    for text, ids in texts.items():
        tape = replay.record(model, ids)
        for name, (key_form, value_form) in forms(s.first).items():
            layers = []
            for r in tape.layers:
                out = F.scaled_dot_product_attention(
                    r.query,
                    key_form(r.key),
                    value_form(r.value),
                    is_causal=True,
                    scale=r.scaling,
                    enable_gqa=True,
                ).transpose(1, 2)
                layers.append(float(replay.relative(out, r.out).mean()))
            rows.append({"text": text, "form": name, "layers": layers})
    return rows


# ------------------------------------------------------------------ accuracy at equal bytes


def accuracy(model: Any, contexts: list[Context], s: Settings) -> list[dict[str, Any]]:
    """Many questions of each context, the model in bfloat16: eviction, 8 bits, and both."""
    dim, rows, full = model.config.head_dim, [], 0
    for store in STORES:
        done = ask(model, contexts, "full", s.length + 512, chunk=s.chunk, store=store)
        full = done.full_nbytes
        # The tokens there are, not the empty slots behind them.
        nbytes = full * Store(store).keys.nbytes(dim, 2) // (2 * dim)
        rows.append(
            {"policy": "full", "store": store, "share": None, "nbytes": nbytes, **common.scored(done)}
        )
    for share in s.shares:
        for policy in s.policies:
            for store in STORES:
                done = ask(model, contexts, policy, f"{int(share * full)}B", chunk=s.chunk, store=store)
                row = {"policy": policy, "store": store, "share": share, "nbytes": done.nbytes}
                rows.append(row | common.scored(done))
    return rows


# ------------------------------------------------------------------ a decode step


@torch.no_grad()
def steps(model: Any, ids: Tensor, s: Settings) -> list[dict[str, Any]]:
    """Processor time of a token when every slot is taken, the forms in turns."""
    caches = {}
    for store in STORES:
        for positions in NUMBERINGS:
            cache = BudgetCache(model, "keydiff", s.budget, store=store, positions=positions)
            model(ids[None], **cache_kwargs(model, cache), use_cache=True, logits_to_keep=1)
            caches[store, positions] = cache
    spent: dict[tuple[str, str], list[float]] = {key: [] for key in caches}
    for i in range(s.steps):
        for key, cache in caches.items():
            start = time.process_time()
            model(ids[i : i + 1][None], **cache_kwargs(model, cache), use_cache=True)
            spent[key].append(1000 * (time.process_time() - start))
    return [
        {
            "store": store,
            "positions": positions,
            "nbytes": caches[store, positions].nbytes,
            **{
                name: sorted(ms)[int(at * (len(ms) - 1))]
                for name, at in (("low", 0.25), ("ms", 0.5), ("high", 0.75))
            },
        }
        for (store, positions), ms in spent.items()
    ]


def run(asked: common.Options, s: Settings) -> dict[str, Any]:
    """Measure everything; the raw results, ready for JSON."""
    model, tokenizer = common.load(asked.model)
    spent: dict[str, float] = {}
    contexts = many_questions(tokenizer, s.length, Uses(contexts=s.contexts))
    least = min(len(c.ids) for c in contexts)
    with common.timed("errors", spent):
        texts = {
            "running text": common.running_text(tokenizer, s.texts, s.text_length),
            "eight numbers in a text": torch.tensor([c.ids[:least] for c in contexts]),
        }
        found = errors(model, texts, s)
    with common.timed("a decode step", spent):
        ids = common.running_text(tokenizer, 1, 2 * s.budget)[0]
        timed = steps(model, ids, s)
    with common.timed("accuracy", spent):
        half, _ = modicum.load(asked.model, dtype="bfloat16", device="cpu")
        right = accuracy(half, contexts, s)
    return {
        "model": common.name_of(model),
        "settings": asdict(s),
        "seconds": spent,
        "errors": found,
        "steps": timed,
        "accuracy": right,
    }


# ------------------------------------------------------------------ tables and picture


def section(results: dict[str, Any]) -> str:
    """The tables."""
    s = results["settings"]
    layers = range(len(results["errors"][0]["layers"]))
    by_layer = common.table(
        ["text and form", *(f"layer {i}" for i in layers)],
        [
            [f"{row['text']}: {row['form']}", *(f"{100 * e:.2f} %" for e in row["layers"])]
            for row in results["errors"]
        ],
    )
    full = [row for row in results["accuracy"] if row["policy"] == "full"]
    told = ", ".join(
        f"`{row['store']}` {common.mib(row['nbytes'])} MiB, {common.percent(row)}" for row in full
    )
    head = ["policy and store", *(f"{100 * share:g} % of the bytes" for share in s["shares"])]
    rows = []
    for policy in s["policies"]:
        for store in STORES:
            mine = [r for r in results["accuracy"] if (r["policy"], r["store"]) == (policy, store)]
            rows.append([f"`{policy}`, {store}", *(common.percent(row) for row in mine)])
    timed = common.table(
        ["store and positions", "MiB held", "a token, ms (quartiles)"],
        [
            [
                f"{row['store']}, {row['positions']}",
                common.mib(row["nbytes"]),
                f"{row['ms']:.1f} ({row['low']:.1f}–{row['high']:.1f})",
            ]
            for row in results["steps"]
        ],
    )
    return (
        "### Error by layer\n\nRelative error of the attention output, from identical inputs in float32.\n\n"
        f"{by_layer}\n\n### Accuracy at equal bytes\n\n{s['contexts']} contexts of {s['length']:,} tokens "
        "with 8 needles, all asked for, the context compressed before; the model in bfloat16, chunks of "
        f"{s['chunk']}. "
        f"All tokens kept: {told}. {common.SCORES}\n\n{common.table(head, rows)}\n\n"
        "![Right answers against bytes](slots.png)\n\n### A decode step\n\n`keydiff`, "
        f"budget {s['budget']:,}, float32, all slots taken; processor time of one core, {s['steps']} steps "
        f"of each in turns.\n\n{timed}"
    )


def draw(results: dict[str, Any]) -> Any:
    """Right answers against measured bytes, a panel for each policy."""
    import matplotlib.pyplot as plt

    policies = results["settings"]["policies"]
    figure, axes = plt.subplots(
        1, len(policies), figsize=(3.9 * len(policies), 3.5), sharey=True, layout="constrained", squeeze=False
    )
    for axis, policy in zip(axes[0], policies, strict=True):
        for store, colour, marker in zip(STORES, ("#000000", "#0072b2", "#d55e00"), "os^", strict=True):
            rows = [r for r in results["accuracy"] if (r["policy"], r["store"]) == (policy, store)]
            rows += [r for r in results["accuracy"] if (r["policy"], r["store"]) == ("full", store)]
            x, y = [r["nbytes"] for r in rows], [100 * r["right"]["mean"] for r in rows]
            name = "16 bits" if store == "model" else store
            axis.plot(x[:-1], y[:-1], marker=marker, color=colour, label=name, lw=1.5, ms=5)
            axis.plot(x[-1:], y[-1:], marker=marker, color=colour, mfc="white", ls="", ms=7)
        axis.set_title(policy)
        byte_axis(axis, [r["nbytes"] for r in results["accuracy"]], "held (hollow: all tokens)")
    axes[0][0].set_ylabel("right answers, %")
    axes[0][0].legend(fontsize=8)
    return figure


def main() -> None:
    asked = common.options(__doc__)
    results = run(asked, QUICK if asked.quick else Settings())
    common.paint(asked.out and asked.out / "slots.png", lambda: draw(results))
    common.publish("slots", asked, results, section(results))


if __name__ == "__main__":
    main()
