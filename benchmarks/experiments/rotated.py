"""Slots in 4 bits: what rotation and finer scales bring, accuracy at equal bytes, and a decode step.

One command: python benchmarks/experiments/rotated.py [--model smollm2] [--out DIR] [--quick]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import common
import replay
import torch
from asking import ask
from torch import Tensor
from torch.nn import functional as F
from which import Settings as Uses
from which import many_questions

import modicum
from modicum import BudgetCache
from modicum.compat import cache_kwargs
from modicum.kv.codec import Codec
from modicum.kv.hadamard import rotated
from modicum.kv.store import Store

STORES = ("int8", "k8v4", "int4")


@dataclass(frozen=True)
class Settings:
    """Sizes; seeds are fixed."""

    texts: int = 4
    text_length: int = 512
    policy: str = "razor(base=manifoldkv, strong=0.2)"
    asked: str = "reference"
    """The model of the questions: at its size many can be asked."""
    length: int = 1024
    contexts: int = 16
    chunk: int = 256
    shares: tuple[float, ...] = (0.035, 0.05, 0.07, 0.1)
    """Budgets, as shares of the bytes of a full cache in 16 bits."""
    budget: int = 512
    steps: int = 40
    """Decode steps that are timed, in turns."""


QUICK = Settings(texts=1, text_length=128, length=512, contexts=4, shares=(0.1,), budget=64, steps=2)


# ------------------------------------------------------------------ attention error


def four_bits(x: Tensor, block: int = 0, length_corrected: bool = False) -> Tensor:
    """x [..., D] in whole numbers up to 7, with a scale for each `block` numbers (0: for the whole vector).

    length_corrected: the scale is such that the vector keeps its length.
    """
    parts = x.unflatten(-1, (-1, block or x.shape[-1]))
    scale = (parts.abs().amax(-1, keepdim=True) * (1 + 2**-8) / 7).bfloat16().to(x.dtype)
    codes = (parts / scale.clamp_min(1e-30)).round().clamp(-7, 7)
    if length_corrected:
        norms = parts.norm(dim=-1, keepdim=True) / codes.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        scale = norms.bfloat16().to(x.dtype)
    return (codes * scale).flatten(-2)


Form = Callable[[Tensor], Tensor]


def forms(dim: int) -> dict[str, tuple[Form, Form, float]]:
    """What becomes of keys and values [B, H, n, D] in each form, and bytes of both for a token and head."""

    def stored(name: str) -> Form:
        codec = Codec(name, rotates_back=True)
        return lambda x: codec.decode(codec.encode(x), x.dtype)

    def turned(form: Form) -> Form:
        return lambda x: rotated(form(rotated(x)))

    half: Form = lambda x: x.bfloat16().to(x.dtype)  # noqa: E731
    by_32: Form = lambda x: four_bits(x, 32)  # noqa: E731
    by_length: Form = lambda x: four_bits(x, length_corrected=True)  # noqa: E731
    eight, four, fine = dim + 2, dim / 2 + 2, dim / 2 + 2 * dim / 32
    return {
        "16 bits": (half, half, 4 * dim),
        "`int8`": (stored("int8"), stored("int8"), 2 * eight),
        "int8, rotated": (turned(stored("int8")), turned(stored("int8")), 2 * eight),
        "`k8v4`: keys int8, values int4": (stored("int8"), stored("int4"), eight + four),
        "k8v4, values not rotated": (stored("int8"), four_bits, eight + four),
        "k8v4, a scale per 32": (stored("int8"), turned(by_32), eight + fine),
        "`int4`: rotated, a scale per vector": (stored("int4"), stored("int4"), 2 * four),
        "int4, not rotated": (four_bits, four_bits, 2 * four),
        "int4, rotated, a scale per 32": (turned(by_32), turned(by_32), 2 * fine),
        "int4, not rotated, a scale per 32": (by_32, by_32, 2 * fine),
        "int4, rotated, lengths kept": (turned(by_length), turned(by_length), 2 * four),
    }


@torch.no_grad()
def errors(model: Any, ids: Tensor) -> list[dict[str, Any]]:
    """Relative error of each layer's attention output, from identical inputs in float32."""
    tape, rows = replay.record(model, ids), []
    for name, (key_form, value_form, nbytes) in forms(tape.layers[0].key.shape[-1]).items():
        layers = []
        for r in tape.layers:
            key, value = key_form(r.key), value_form(r.value)
            settings: dict[str, Any] = {"is_causal": True, "scale": r.scaling, "enable_gqa": True}
            out = F.scaled_dot_product_attention(r.query, key, value, **settings).transpose(1, 2)
            layers.append(float(replay.relative(out, r.out).mean()))
        rows.append({"form": name, "nbytes": nbytes, "layers": layers})
    return rows


# ------------------------------------------------------------------ accuracy at equal bytes


def accuracy(s: Settings) -> list[dict[str, Any]]:
    """Many questions of each context, the model in bfloat16."""
    model, tokenizer = modicum.load(s.asked, dtype="bfloat16", device="cpu")
    contexts = many_questions(tokenizer, s.length, Uses(contexts=s.contexts))
    full = ask(model, contexts[:1], "full", s.length + 512, chunk=s.chunk).full_nbytes
    rows = []
    for share in s.shares:
        for store in STORES:
            done = ask(model, contexts, s.policy, f"{int(share * full)}B", chunk=s.chunk, store=store)
            rows.append({"store": store, "share": share, "nbytes": done.nbytes, **common.scored(done)})
    return rows


# ------------------------------------------------------------------ a decode step


@torch.no_grad()
def steps(model: Any, ids: Tensor, s: Settings) -> list[dict[str, Any]]:
    """Processor time of a token when every slot is taken, the stores in turns."""
    caches = {}
    for store in ("model", *STORES):
        caches[store] = BudgetCache(model, "keydiff", s.budget, store=store)
        model(ids[None], **cache_kwargs(model, caches[store]), use_cache=True, logits_to_keep=1)
    spent: dict[str, list[float]] = {store: [] for store in caches}
    for i in range(s.steps):
        for store, cache in caches.items():
            start = time.process_time()
            model(ids[i : i + 1][None], **cache_kwargs(model, cache), use_cache=True)
            spent[store].append(1000 * (time.process_time() - start))
    return [
        {
            "store": store,
            "nbytes": caches[store].nbytes,
            **{
                name: sorted(ms)[int(at * (len(ms) - 1))]
                for name, at in (("low", 0.25), ("ms", 0.5), ("high", 0.75))
            },
        }
        for store, ms in spent.items()
    ]


def run(asked: common.Options, s: Settings) -> dict[str, Any]:
    """Measure everything; the raw results, ready for JSON."""
    model, tokenizer = common.load(asked.model)
    spent: dict[str, float] = {}
    with common.timed("errors", spent):
        found = errors(model, common.running_text(tokenizer, s.texts, s.text_length))
    with common.timed("a decode step", spent):
        timed = steps(model, common.running_text(tokenizer, 1, s.budget + 64)[0], s)
    with common.timed("accuracy", spent):
        right = accuracy(s)
    dim, itemsize = model.config.head_dim, 2
    return {
        "model": common.name_of(model),
        "settings": asdict(s),
        "seconds": spent,
        "bytes": {
            name: sum(codec.nbytes(dim, itemsize) for codec in (Store(name).keys, Store(name).values))
            for name in ("model", *STORES)
        },
        "errors": found,
        "steps": timed,
        "accuracy": right,
    }


def section(results: dict[str, Any]) -> str:
    """The tables."""
    s = results["settings"]
    by_form = common.table(
        ["form", "bytes of a token and head", "error, mean of layers", "least", "largest"],
        [
            [
                row["form"],
                f"{row['nbytes']:g}",
                *(f"{100 * f(row['layers']):.2f} %" for f in (fmean, min, max)),
            ]
            for row in results["errors"]
        ],
    )
    head = ["store", *(f"{100 * share:g} % of the bytes" for share in s["shares"])]
    rows = [
        [f"`{store}`", *(common.percent(row) for row in results["accuracy"] if row["store"] == store)]
        for store in STORES
    ]
    eight = next(row["ms"] for row in results["steps"] if row["store"] == "int8")
    timed = common.table(
        ["store", "MiB held", "a token, ms (quartiles)", "of int8's"],
        [
            [
                f"`{row['store']}`",
                common.mib(row["nbytes"]),
                f"{row['ms']:.1f} ({row['low']:.1f}–{row['high']:.1f})",
                f"{row['ms'] / eight:.2f}",
            ]
            for row in results["steps"]
        ],
    )
    return (
        "### Error of attention\n\nRelative error of each layer's output, from identical inputs in float32: "
        f"{s['texts']} texts of {s['text_length']} tokens. Bytes are of keys and values, scales included.\n\n"
        f"{by_form}\n\n### Accuracy at equal bytes\n\nModel `{s['asked']}` in bfloat16, `{s['policy']}`, "
        f"{s['contexts']} contexts of {s['length']:,} tokens with 8 needles, all asked for, the context "
        f"compressed before, chunks of {s['chunk']}. {common.SCORES}\n\n{common.table(head, rows)}\n\n"
        f"### A decode step\n\n`keydiff`, budget {s['budget']:,}, float32, all slots taken; processor time "
        f"of one core, {s['steps']} steps of each in turns.\n\n{timed}"
    )


def main() -> None:
    asked = common.options(__doc__)
    results = run(asked, QUICK if asked.quick else Settings())
    common.publish("rotated", asked, results, section(results))


if __name__ == "__main__":
    main()
