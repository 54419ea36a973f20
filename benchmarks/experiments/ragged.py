"""What a decode step costs with heads of unlike sizes, and with coded slots, beside heads alike and plain
slots at the same budget.

    python benchmarks/experiments/ragged.py            # reference and, where it is installed, smollm2

Settings take turns, some tokens each; ratios are of neighbouring turns. Processor time of one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from common import DOCS, table
from page import write_section

import modicum
from modicum import BudgetCache, ModicumError
from modicum.generation.inputs import Block
from modicum.generation.interrupt import Interrupt
from modicum.generation.reader import Reader

SETTINGS = (
    *((policy, "model") for policy in ("keydiff", "calibrated+keydiff", "manifoldkv", "auto")),
    *((policy, store) for store in ("int8", "k8v4") for policy in ("keydiff", "auto")),
)
"""Policies, and what their slots are stored in."""
BASE = ("keydiff", "model")
WARM, STEPS = 2, 8


def read(reader: Reader, tokens: list[int]) -> None:
    reader.take(Block.of([tokens], 0), Interrupt(), lambda _: None)


def measure(name: str, length: int, budget: str, turns: int) -> list[list[str]]:
    """A line of the table for each setting."""
    model, tokenizer = modicum.load(name)
    ids = tokenizer(modicum.sample_text()[: 8 * length], verbose=False)["input_ids"][:length]
    readers = {}
    for policy, store in SETTINGS:
        cache = BudgetCache(model, policy, budget, n_sink=4, recent=16, store=store, length=length)
        readers[policy, store] = Reader(model, cache, 1, 0)
        read(readers[policy, store], ids)
    seconds: dict[tuple[str, str], list[float]] = {setting: [] for setting in SETTINGS}
    for _ in range(turns):
        for setting, reader in readers.items():
            for _ in range(WARM):
                read(reader, ids[:1])
            clock = time.thread_time()
            for _ in range(STEPS):
                read(reader, ids[:1])
            seconds[setting].append((time.thread_time() - clock) / STEPS)
    lines = []
    for (policy, store), taken in seconds.items():
        ratios = sorted(a / b for a, b in zip(taken, seconds[BASE], strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        sizes = len({n for row in readers[policy, store].cache.plan.capacities for n in row})
        ratio = f"{statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}]"
        lines.append(
            [
                name,
                str(length),
                budget,
                f"`{policy}`",
                store,
                str(sizes),
                f"{1e3 * statistics.median(taken):.1f}",
                ratio,
            ]
        )
    return lines


def main() -> None:
    """Measure, and renew the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--turns", type=int, default=24)
    parser.add_argument("--quick", action="store_true", help="the reference model, two turns; writes nothing")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for name, length in (("reference", 1024), ("reference", 2048), ("smollm2", 1024)):
        if asked.quick and lines:
            break
        try:
            lines += measure(name, length, "12.5%", 2 if asked.quick else asked.turns)
        except ModicumError as error:
            print(f"{name} is left out: {error}")
    head = ["model", "tokens", "budget", "policy", "store", "sizes", "ms a step", "÷ KeyDiff [quartiles]"]
    text = table(head, lines)
    print(text)
    if not asked.quick:
        write_section(DOCS / "budgets.md", "decode", text)


if __name__ == "__main__":
    main()
