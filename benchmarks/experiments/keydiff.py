"""KeyDiff's claims on the reference model: distance and attention, accuracy under a budget, constant memory.

    python benchmarks/experiments/keydiff.py

Writes docs/experiments/keydiff.json and pictures, and renews the tables of docs/experiments/keydiff.md.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from ability import LENGTHS, TASKS, Ability, sentence
from asking import ask
from common import (
    SCORES,
    Options,
    load,
    mib,
    name_of,
    options,
    paint,
    percent,
    publish,
    running_text,
    scored,
    spearman,
    table,
    timed,
)
from interval import Interval
from keydiff_pictures import draw_accuracy, draw_correlation, draw_memory
from listening import listen
from torch import Tensor

import modicum
from modicum import KeyDiff, View

POLICIES = ("keydiff", "snapkv", "tova", "h2o", "streamingllm")
BARE = "keydiff, unprotected"
CHUNK = 128
"""The paper's block."""
SINKS = 4
NEEDLE = "text with a needle"


@dataclass(frozen=True)
class Settings:
    """One run."""

    texts: int = 4
    """Running texts, and as many contexts with needles, in which keys and attention are compared."""
    length: int = 1024
    lengths: tuple[int, ...] = LENGTHS
    contexts: int = 16
    """Per task."""
    parts: tuple[int, ...] = (16, 8, 4, 2)
    """Budgets: these parts of the context's length."""
    prompts: tuple[int, ...] = (8_192, 16_384, 65_536)
    held: int = 1024
    """Budget of the long prompts."""
    seed: int = 11


QUICK = Settings(texts=2, length=512, contexts=6)


# ------------------------------------------------------------------ distance and attention


@torch.no_grad()
def correlation(model: Any, tokenizer: Any, s: Settings) -> dict[str, Any]:
    """Rank correlation of a key's distance from the mean key with the attention that it gets, per layer and
    KV head, over running text and contexts with needles."""
    made = TASKS["needle"](tokenizer, s.texts, s.length, s.seed)
    contexts = [c.ids for c in made]
    least = min(map(len, contexts))
    wanted = [_place(c.ids[:least], c.questions[0].answers[0]) for c in made]
    groups = {
        "running text": running_text(tokenizer, s.texts, s.length),
        NEEDLE: torch.tensor([ids[:least] for ids in contexts]),
    }
    found: dict[str, Any] = {}
    for name, ids in groups.items():
        heard: list[dict[str, Tensor]] = []
        marked = wanted if name == NEEDLE else []
        listen(model, ids, lambda view, heard=heard, marked=marked: heard.append(_compare(view, marked)))
        found[name] = {
            key: torch.stack([layer[key] for layer in heard]).tolist() for key in ("later", "last quarter")
        }
        found[name]["deciles"] = torch.stack([layer["deciles"] for layer in heard]).tolist()
        if marked:
            ranks = torch.stack([layer["ranks"] for layer in heard])  # [L, 2]
            found[name]["answer's rank"] = {
                "distance": ranks[:, 0].tolist(),
                "attention": ranks[:, 1].tolist(),
            }
    return found


def _place(ids: list[int], answer: list[int]) -> slice:
    """Where the answer's tokens stand in the context."""
    size = len(answer)
    for start in range(len(ids) - size + 1):
        if ids[start : start + size] == answer:
            return slice(start, start + size)
    return slice(0, 0)


def _compare(view: View, marked: list[slice]) -> dict[str, Tensor]:
    """Of one layer: correlations [H], means over texts; attention per decile of distance, [10]; and where the
    marked tokens of each text rank by distance and by attention received, 0 lowest to 1 highest, [2]."""
    b, h, n = view.positions.shape
    distance = KeyDiff().score(view)  # -cos(mean key, key)
    late = 3 * n // 4
    later, last = torch.zeros(b, h, n), torch.zeros(b, h, n)
    first = 0
    for rows in view.row_tiles():
        rows = rows.mean(2)  # [B, H, r, N], over the query heads of a group
        at = torch.arange(first, first + rows.shape[2])
        rows[:, :, at - first, at] = 0.0  # not what a token pays to itself
        later += rows.sum(2)
        last += rows[:, :, at >= late].sum(2)
        first = int(at[-1]) + 1
    later /= torch.arange(n - 1, -1, -1).clamp_min(1)  # per query that came later
    # The same queries for every key: those of the last quarter, for keys before it. Sinks are left out.
    old = slice(SINKS, late)
    share = last[..., old] / last[..., old].sum(-1, keepdim=True)
    order = distance[..., old].argsort(-1)
    parts = torch.tensor_split(share.gather(-1, order), 10, dim=-1)
    even = [part.shape[-1] / share.shape[-1] for part in parts]
    deciles = [part.sum(-1).mean() / e for part, e in zip(parts, even, strict=True)]
    ranks = torch.stack([x.argsort(-1).argsort(-1).double() / (n - 1) for x in (distance, later)])
    own = [ranks[:, text, :, at].mean((1, 2)) for text, at in enumerate(marked) if at.stop > at.start]
    return {
        "ranks": torch.stack(own).mean(0) if own else torch.full((2,), math.nan),
        "later": spearman(distance[..., SINKS : n - 1], later[..., SINKS : n - 1]).mean(0),
        "last quarter": spearman(distance[..., old], last[..., old]).mean(0),
        "deciles": torch.stack(deciles),
    }


# ------------------------------------------------------------------ accuracy


def accuracy(model: Any, tokenizer: Any, abilities: list[Ability], s: Settings) -> list[dict[str, Any]]:
    """Share of right answers of every policy at every budget, each sample's question unknown beforehand."""
    found = []
    for able in abilities:
        contexts = TASKS[able.task](tokenizer, s.contexts, able.length, s.seed)
        budgets = [able.budget(part) for part in s.parts]
        settings = [("full", 2 * able.length)] + [(p, b) for b in budgets for p in (*POLICIES, BARE)]
        for policy, budget in settings:
            peaks: list[float] = []
            guard = {"n_sink": 0, "recent": 0} if policy == BARE else {}
            done = ask(
                model,
                contexts,
                "keydiff" if policy == BARE else policy,
                budget,
                chunk=CHUNK,
                prepare=lambda cache, peaks=peaks: peaks.append(cache.peak_nbytes / cache.batch_size),
                **guard,
            )
            found.append(
                {
                    "task": able.task,
                    "length": able.length,
                    "context": sum(len(c.ids) for c in contexts) / len(contexts),
                    "policy": policy,
                    "budget": None if policy == "full" else budget,
                    **scored(done),
                    "nbytes": done.full_nbytes if policy == "full" else done.nbytes,
                    "peak": max(peaks),
                }
            )
            print(able.task, policy, budget, percent(found[-1]), file=sys.stderr, flush=True)
    return found


# ------------------------------------------------------------------ a long prompt


def long_prompts(asked: Options, s: Settings) -> list[dict[str, Any]]:
    """Each prompt in a fresh process."""
    found = []
    for tokens in s.prompts:
        command = [sys.executable, __file__, "--model", asked.model, "--read", str(tokens), str(s.held)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(found[-1], file=sys.stderr, flush=True)
    return found


def read(name: str, tokens: int, budget: int) -> dict[str, Any]:
    """Read so many tokens of the text, which comes again from its start, and measure."""
    from machine import peak_memory

    model, tokenizer = load(name)
    text = modicum.sample_text()
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    prompt = torch.tensor(ids * (1 + tokens // len(ids)))[:tokens][None]
    from modicum.generation.inputs import Block
    from modicum.generation.interrupt import Interrupt
    from modicum.generation.reader import Reader

    loaded = peak_memory()
    cache = modicum.BudgetCache(model, "keydiff", budget, chunk=CHUNK)
    reader = Reader(model, cache, 1, 0)
    start = time.process_time()
    reader.take(Block(prompt, None), Interrupt(), lambda _: None)
    seconds = time.process_time() - start  # of one thread: the same on a busy machine
    cache.check_integrity()
    return {
        "tokens": tokens,
        "budget": budget,
        "nbytes": cache.nbytes,
        "peak": cache.peak_nbytes,
        "full": cache.full_nbytes,
        "loaded": loaded,
        "resident": peak_memory(),
        "seconds": seconds,
        "speed": tokens / seconds,
    }


# ------------------------------------------------------------------ what is shown


def section(results: dict[str, Any]) -> str:
    """The tables, in Markdown."""
    s = results["settings"]
    parts = ["### Distance from the mean key and attention received", ""]
    rows = []
    for name, found in results["correlation"].items():
        for kind in ("later", "last quarter"):
            values = torch.tensor(found[kind])
            flat = values.flatten()
            rows.append(
                [
                    f"{name}, queries: {'all later' if kind == 'later' else kind}",
                    f"{flat.mean():+.2f}",
                    f"{flat.min():+.2f} to {flat.max():+.2f}",
                    f"{int((flat > 0).sum())} of {len(flat)}",
                    *(f"{layer.mean():+.2f}" for layer in values),
                ]
            )
    layers = [f"layer {i}" for i in range(len(rows[0]) - 4)]
    parts += [
        f"Spearman's rank correlation per layer and KV head ({s['texts']} texts of {s['length']} tokens; the "
        f"first {SINKS} tokens left out):",
        "",
        table(["", "mean", "range", "positive heads", *layers], rows),
        "",
        "Where the needle's own tokens (the answer's digits) rank among the context's, 0 lowest to 1 "
        "highest, mean over heads:",
        "",
        table(
            ["by", *layers],
            [
                [name, *(f"{rank:.2f}" for rank in each)]
                for name, each in results["correlation"][NEEDLE]["answer's rank"].items()
            ],
        ),
        "",
        f"### Accuracy under a budget, chunks of {CHUNK}, question hidden",
        "",
        results["lengths"],
        "",
        f"{s['contexts']} contexts per task. {SCORES} MiB as held after the context was read, positions and "
        "policy state included. Second tables: KeyDiff minus the others in tokens on the same contexts, in "
        "points, **bold** where the 95 % interval leaves out 0.",
    ]
    for task in dict.fromkeys(row["task"] for row in results["accuracy"]):
        mine = [row for row in results["accuracy"] if row["task"] == task]
        parts += ["", f"**{task}**, {mine[0]['context']:.0f} tokens of context", ""]
        parts += [_accuracy_table(mine), "", _differences(mine)]
    parts += [
        "",
        f"### Long prompts, budget {s['held']} per KV head, chunks of {CHUNK}, one thread",
        "",
        table(
            [
                "tokens",
                "cache MiB",
                "its peak MiB",
                "full cache MiB",
                "process peak MiB",
                "of that before reading",
                "tokens per second of one core",
            ],
            [
                [
                    f"{row['tokens']:,}",
                    mib(row["nbytes"]),
                    mib(row["peak"]),
                    mib(row["full"]),
                    f"{row['resident'] / 2**20:.0f}",
                    f"{row['loaded'] / 2**20:.0f}",
                    f"{row['speed']:.0f}",
                ]
                for row in results["memory"]
            ],
        ),
    ]
    return "\n".join(parts)


def _accuracy_table(mine: list[dict[str, Any]]) -> str:
    full = next(row for row in mine if row["policy"] == "full")
    budgets = sorted({row["budget"] for row in mine if row["budget"]})
    rows: list[list[object]] = []
    for policy in dict.fromkeys(row["policy"] for row in mine if row["budget"]):
        by = {row["budget"]: row for row in mine if row["policy"] == policy}
        cells = [f"{percent(by[b])}, {mib(by[b]['nbytes'])} MiB" for b in budgets]
        rows.append([policy, *cells])
    rows.append(["full cache", f"{percent(full)}, {mib(full['nbytes'])} MiB", *[""] * (len(budgets) - 1)])
    return table(["policy", *(f"{b} tokens per KV head" for b in budgets)], rows)


def _differences(mine: list[dict[str, Any]]) -> str:
    budgets = sorted({row["budget"] for row in mine if row["budget"]})
    scores = {(row["policy"], row["budget"]): row["tokens"]["each"] for row in mine}
    rows: list[list[object]] = []
    for policy in [p for p in (*POLICIES, BARE) if p != "keydiff"]:
        cells = []
        for budget in budgets:
            gap = Interval.between(scores["keydiff", budget], scores[policy, budget])
            text = f"{100 * gap.mean:+.0f} [{100 * gap.low:+.0f}, {100 * gap.high:+.0f}]"
            cells.append(f"**{text}**" if gap.clear else text)
        rows.append([policy, *cells])
    return table(["keydiff minus", *(f"{b} tokens" for b in budgets)], rows)


def main() -> None:
    asked = options(__doc__)
    s = QUICK if asked.quick else Settings()
    model, tokenizer = load(asked.model)
    spent: dict[str, float] = {}
    results: dict[str, Any] = {"model": name_of(model), "settings": vars(s), "seconds": spent}
    with timed("correlation", spent):
        results["correlation"] = correlation(model, tokenizer, s)
    with timed("accuracy", spent):
        abilities = [Ability.of(model, tokenizer, task, s.lengths) for task in TASKS]
        results["lengths"] = sentence(abilities)
        results["accuracy"] = accuracy(model, tokenizer, abilities, s)
    with timed("long prompts", spent):
        results["memory"] = long_prompts(asked, s)
    pictures = {"correlation": draw_correlation, "accuracy": draw_accuracy, "memory": draw_memory}
    for name, draw in pictures.items():
        path = None if asked.out is None else asked.out / f"keydiff-{name}.png"
        paint(path, lambda name=name, draw=draw: draw(results[name]))
    publish("keydiff", asked, results, section(results))


if __name__ == "__main__":
    if "--read" in sys.argv:  # the process of one long prompt
        at = sys.argv.index("--read")
        print(json.dumps(read(sys.argv[sys.argv.index("--model") + 1], *map(int, sys.argv[at + 1 : at + 3]))))
    else:
        main()
