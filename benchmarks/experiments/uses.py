"""Three uses of the embedded reference model at 10 and 5 % of the bytes of a 16-bit cache: `auto` and
`manifoldkv` under the same calibration, in 16, 8 and 4 bits. One core, resumable.

    python benchmarks/experiments/uses.py --work FOLDER          # measures what rows.jsonl does not have
    python benchmarks/experiments/uses.py --work FOLDER --docs   # the table on docs/experiments/budgets.md
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import common
import which
import which_page
from measured_rows import append_row, read_rows, write_docs

SHARES = (0.1, 0.05)
POLICIES = ("auto", "calibrated+manifoldkv")
STORES = ("model", "int8", "k8v4", "int4")
SETTINGS = replace(which.Settings(), contexts=16)


def measure(work: Path) -> None:
    """Append a row for each use, policy, form of slots and share that has none."""
    bench = which.Bench("reference", SETTINGS, SETTINGS.lengths[0])
    rows = {row["key"]: row for row in read_rows(work)}
    for use in which_page.USES:
        key = f"{use}, full"
        if key not in rows:
            whole = bench.measure(use, "full", None)
            rows[key] = {"key": key, "use": use, **common.scored(whole), "nbytes": whole.full_nbytes}
            append_row(work, rows[key])
        bench.full[use] = rows[key]["nbytes"]
    for policy, store, share, use in product(POLICIES, STORES, SHARES, which_page.USES):
        key = f"{use}, {policy}, {store}, {share}"
        if key in rows:
            continue
        started = time.process_time()
        # The model runs in float32, as bfloat16 is slow on many processors. Slots in the model's own dtype
        # get the share of a cache in that dtype, others half of it, that of 16 bits.
        done = bench.measure(use, policy, share if store == "model" else share / 2, store)
        row = {"key": key, "use": use, "policy": policy, "store": store, "share": share}
        row |= common.scored(done) | {"nbytes": done.nbytes}
        append_row(work, row | {"cpu_seconds": round(time.process_time() - started, 1)})
        print(key, f"{100 * row['right']['mean']:.0f} %", file=sys.stderr, flush=True)


def section(raw: dict[str, Any]) -> str:
    """The table, markers left out."""
    rows = {row["key"]: row for row in raw["rows"]}
    lines = [["full cache", "", *[common.percent(rows[f"{use}, full"]) for use in which_page.USES]]]
    for share, policy, store in product(SHARES, POLICIES, STORES):
        cells = [rows.get(f"{use}, {policy}, {store}, {share}") for use in which_page.USES]
        if all(cells):
            told = [common.percent(cell) for cell in cells if cell is not None]
            slots = "16 bits" if store == "model" else store
            lines.append([f"`{policy}`, {slots}", f"{share:.0%}", *told])
    return (
        f"Measured {raw['date']} ({raw['machine']['processor']}), float32: {SETTINGS.contexts} contexts of "
        f"{SETTINGS.lengths[0]:,} tokens with {SETTINGS.facts} needles, read in chunks of {SETTINGS.chunk}; "
        f"long answers of {SETTINGS.stream} tokens, read {SETTINGS.step} at a time. Slots in 16 bits are "
        f"measured in 32, with twice the bytes. {common.SCORES}\n\n"
        + common.table(["policy, slots", "of the bytes", *which_page.USES], lines)
    )


def main() -> None:
    """Measure what is missing, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="gets rows.jsonl")
    parser.add_argument("--docs", action="store_true", help="write the table of what was measured")
    asked = parser.parse_args()
    if asked.docs:
        write_docs(asked.work, section, "benchmarks_uses.json", "experiments/budgets.md", "uses")
        return
    asked.work.mkdir(parents=True, exist_ok=True)
    measure(asked.work)


if __name__ == "__main__":
    main()
