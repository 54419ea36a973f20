"""Time and memory against the length of the prompt and against the budget, as a page's section and a figure.

Each point is a process of its own: its peak is its own. Theory says that prefill is linear in the length, a
decoded token and the memory flat, and that both grow in a straight line with the budget.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import fresh
import machine
import report
import torch
from machine import peak_memory
from peak import FULL
from picture import paint
from rich.console import Console
from rich.progress import track
from subject import PRIME, Settings, as_text, budgeted, decode, one_shot, plain, random_ids, random_model

_DOCS = Path(__file__).resolve().parent.parent / "docs"
LENGTHS = tuple(2**n for n in range(10, 19))
FULL_LENGTHS = tuple(2**n for n in range(10, 16))
"""Beyond, one shot takes minutes: it grows with the square."""
BUDGETS = tuple(2**n for n in range(8, 14))
_BLOCKS, _BLOCK = 5, 16

Point = dict[str, Any]


def measure(policy: str, tokens: int, budget: int, chunk: int, threads: int) -> Point:
    """One prompt, then blocks of decoded tokens, in this process."""
    torch.set_num_threads(threads)
    settings = Settings(tokens=tokens, budget=budget, chunk=chunk, threads=threads)
    model = random_model(settings.seed)
    ids, more = random_ids(tokens), random_ids(_BLOCK, 1)
    warm = ids[:, :64]
    loaded = peak_memory()
    if policy == FULL:
        one_shot(model, warm)
        prefill, cache = one_shot(model, ids)
        with plain(model):
            steps = [decode(model, cache, more) for _ in range(_BLOCKS)]
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    else:
        budgeted(model, as_text(warm), policy, settings)
        prefill, kept = budgeted(model, as_text(ids), policy, settings)
        steps = [decode(model, kept, more) for _ in range(_BLOCKS)]
        kept.check_integrity()
        held = kept.nbytes
    return {
        "policy": policy,
        "tokens": tokens,
        "budget": budget,
        "prefill": prefill,
        "decode": steps[1:],  # the first block warms up
        "held": held,
        "peak": peak_memory() - loaded,
    }


def _alone(point: tuple[str, int, int], settings: Settings) -> Point:
    numbers = zip(("tokens", "budget"), point[1:], strict=True)
    options = [f"--{name}={value}" for name, value in numbers]
    options += [f"--chunk={settings.chunk}", f"--threads={settings.threads}"]
    return fresh.answer(Path(__file__).name, ["--policy", point[0], *options])


def run(
    settings: Settings, lengths: Sequence[int], full: Sequence[int], budgets: Sequence[int]
) -> list[Point]:
    """Every point, the contenders in turns."""
    points: list[tuple[str, int, int]] = []
    for tokens in lengths:
        points.append((PRIME, tokens, settings.budget))
        points += [(FULL, tokens, tokens)] if tokens in full else []
    points += [(PRIME, settings.tokens, budget) for budget in budgets if budget != settings.budget]
    console = Console(stderr=True)
    return [_alone(point, settings) for point in track(points, "scaling", console=console)]


def section(raw: dict[str, Any]) -> str:
    """The tables, markers left out."""
    s, points = raw["settings"], raw["points"]
    by_length = [p for p in points if p["policy"] == PRIME and p["budget"] == s["budget"]]
    full = {p["tokens"]: p for p in points if p["policy"] == FULL}
    rows = [
        [f"{p['tokens']:,}", *_cells(p), *(_cells(full[p["tokens"]]) if p["tokens"] in full else ["–"] * 3)]
        for p in by_length
    ]
    head = ["tokens", "prefill", "a token", "peak", *(f"{x}, {FULL}" for x in ("prefill", "a token", "peak"))]
    by_budget = sorted((p for p in points if _at_one_length(p, s)), key=lambda p: p["budget"])
    more = [[f"{p['budget']:,}", *_cells(p), f"{p['held'] / 2**20:,.1f} MiB"] for p in by_budget]
    return "\n\n".join(
        [
            f"Measured {raw['date']} in {raw['minutes']} minutes by `benchmarks/scaling.py` on "
            f"{raw['machine']['cores']} cores ({raw['machine']['processor']}), KeyDiff, chunk "
            f"{s['chunk']:,}. "
            "*Peak* is what the process had resident at its most, above the loaded model.",
            "![time and memory against length and budget](benchmarks_scaling.png)",
            f"**Against the length**, budget {s['budget']:,}:",
            report.table(head, rows),
            f"**Against the budget**, {s['tokens']:,} tokens:",
            report.table(["budget", "prefill", "a token", "peak", "held"], more),
        ]
    )


def _at_one_length(p: Point, s: dict[str, Any]) -> bool:
    return p["policy"] == PRIME and p["tokens"] == s["tokens"]


def _cells(p: Point) -> list[str]:
    step = statistics.median(p["decode"])
    return [f"{p['prefill']:.2f} s", f"{step * 1e3:.1f} ms", f"{p['peak'] / 2**20:,.0f} MiB"]


def draw(raw: dict[str, Any]) -> Any:
    """Two lines of three panels: prefill, a token and peak, against the length and against the budget."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    s, points = raw["settings"], raw["points"]
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.2), layout="constrained")
    kinds = (
        ("prefill, seconds", lambda p: p["prefill"]),
        ("a decoded token, ms", lambda p: statistics.median(p["decode"]) * 1e3),
        ("peak above the model, MiB", lambda p: p["peak"] / 2**20),
    )
    by_length = {
        f"KeyDiff, budget {s['budget']:,}": [
            p for p in points if p["policy"] == PRIME and p["budget"] == s["budget"]
        ],
        FULL: [p for p in points if p["policy"] == FULL],
    }
    by_budget = sorted((p for p in points if _at_one_length(p, s)), key=lambda p: p["budget"])
    for line, (groups, what) in zip(
        axes,
        ((by_length, "tokens"), ({f"KeyDiff, {s['tokens']:,} tokens": by_budget}, "budget")),
        strict=True,
    ):
        for axis, (title, value) in zip(line, kinds, strict=True):
            for name, found in groups.items():
                axis.plot([p[what] for p in found], [value(p) for p in found], "o-", label=name, markersize=4)
            axis.set(xscale="log", yscale="log", xlabel=f"{what}", title=title)
            axis.set_xticks([p[what] for p in next(iter(groups.values()))][::2])
            axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:g}K")
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_ylim(bottom=min(axis.get_ylim()[0], axis.get_ylim()[1] / 30))  # flat lines look flat
            axis.legend()
    return figure


def main() -> None:
    """Measure, write, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="few and short points; prints and writes nothing"
    )
    parser.add_argument("--policy", help="measure one point in this process and print it as JSON")
    for name in ("tokens", "budget", "chunk", "threads"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Settings(), name))
    asked = parser.parse_args()
    if asked.policy:
        print(json.dumps(measure(asked.policy, asked.tokens, asked.budget, asked.chunk, asked.threads)))
        return
    settings = Settings(tokens=asked.tokens, budget=asked.budget, chunk=asked.chunk, threads=asked.threads)
    started = datetime.now().astimezone()
    quick = (LENGTHS[:2], FULL_LENGTHS[:1], BUDGETS[:1])
    points = run(settings, *(quick if asked.quick else (LENGTHS, FULL_LENGTHS, BUDGETS)))
    raw = {
        **machine.since(started),
        "settings": {"tokens": asked.tokens, "budget": asked.budget, "chunk": asked.chunk},
        "points": points,
    }
    report.publish(raw, section, "scaling", keep=not asked.quick)
    if not asked.quick:
        paint(_DOCS / "benchmarks_scaling.png", lambda: draw(raw))


if __name__ == "__main__":
    main()
