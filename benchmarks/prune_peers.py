"""Pruning beside torchao and llm-compressor: the same model, tokens and dtype, each in its own environment, a
process for each run, in turns. Run by `make bench-prune-peers`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import machine
import report
from prune import HELD, MODELS, SEQUENCES, of, spread
from safetensors.torch import save_file

import modicum
from modicum.loading import find
from modicum.weights import calibration

_ROOT = Path(__file__).resolve().parent.parent
_PEERS = Path(__file__).resolve().parent / "peers"
SYSTEMS = {
    "torchao": (_ROOT / ".venv-torchao/bin/python", "prune_torchao.py"),
    "llm-compressor": (_ROOT / ".venv-llmcompressor/bin/python", "prune_llmcompressor.py"),
    "modicum": (Path(sys.executable), "prune_ours.py"),
}
RUNS = (
    ("torchao", "wanda", ("modicum", "wanda squared, layer, dense inputs")),
    ("modicum", "wanda squared, layer, dense inputs", None),
    ("modicum", "wanda, layer", None),
    ("llm-compressor", "wanda", ("modicum", "wanda")),
    ("modicum", "wanda", None),
    ("llm-compressor", "sparsegpt", ("modicum", "sparsegpt, layer")),
    ("modicum", "sparsegpt, layer", None),
    ("modicum", "sparsegpt", None),
    ("modicum", "sparsegpt + lsq", None),
    ("modicum", "wanda + swap + lsq", None),
    ("modicum", "alps", None),
)
"""System, way, and which of ours is the same method."""
AMOUNTS = ("0.5", "0.6", "0.7", "2:4")


def run(system: str, method: str, amount: str, ids: Path) -> dict[str, Any]:
    """What one run tells; {"failed": why} if it did not end well."""
    python, script = SYSTEMS[system]
    options = ["--model", str(find("reference")), "--ids", str(ids), "--method", method, "--amount", amount]
    done = subprocess.run(
        [str(python), str(_PEERS / script), *options], capture_output=True, text=True, check=False
    )
    if done.returncode:
        told = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        return {"failed": told[-1][:300]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(seeds: int, amounts: tuple[str, ...]) -> list[dict[str, Any]]:
    """Every run with every seed and amount, in turns."""
    _, tokenizer = modicum.load("reference")
    text = modicum.sample_text()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            path = Path(folder) / f"{seed}.safetensors"
            ids = calibration.tokens(text, tokenizer, SEQUENCES + HELD, MODELS["reference"], seed)
            save_file({"calibration": ids[:SEQUENCES].clone(), "held": ids[SEQUENCES:].clone()}, path)
            for amount in amounts:
                for system, method, _ in RUNS:
                    told = run(system, method, amount, path)
                    found.append({"system": system, "method": method, "amount": amount, "seed": seed} | told)
                    print(found[-1], file=sys.stderr, flush=True)
    return found


def section(raw: dict[str, Any]) -> str:
    """The table, markers left out."""
    m, found = raw["machine"], raw["found"]
    amounts = [amount for amount in AMOUNTS if of(found, amount=amount)]
    rows = []
    for system, method, same in RUNS:
        mine = of(found, system=system, method=method)
        done = [x for x in mine if "failed" not in x]
        row = [f"{system}: {method}"]
        for amount in amounts:
            some = [x for x in done if x["amount"] == amount]
            cell = spread([x["perplexity"] for x in some])
            ratios = _ratios(some, found, same) if same else []
            if ratios:
                cell += f" [{statistics.mean(ratios):.3f}]"
            row.append(cell or "failed")
        seconds = [x["seconds"] for x in done]
        row.append(f"{statistics.median(seconds):.1f} s" if seconds else "")
        row.append(f"{statistics.median(x['peak'] for x in done) / 2**20:.0f} MiB" if done else "")
        rows.append(row)
    titles = [f"{float(a):.0%}" if ":" not in a else a for a in amounts]
    text = (
        f"Measured {raw['date']} in {raw['minutes']} minutes on {m['cores']} cores ({m['processor']}): "
        f"`reference`, {SEQUENCES} × {MODELS['reference']} tokens of the sample text, perplexity of {HELD} "
        f"other sequences, mean and range of {len({x['seed'] for x in found})} seeds. In brackets a peer's "
        "perplexity ÷ ours by the same rule. Time and memory above the loaded model: medians."
    )
    return "\n\n".join([text, report.table(["", *titles, "time", "memory"], rows)])


def _ratios(some: list[dict[str, Any]], found: list[dict[str, Any]], same: tuple[str, str]) -> list[float]:
    """Each perplexity ÷ ours with the same seed and amount, where ours did not fail."""
    pairs = [
        (x, y)
        for x in some
        for y in of(found, system=same[0], method=same[1], amount=x["amount"], seed=x["seed"])
    ]
    return [x["perplexity"] / y["perplexity"] for x, y in pairs if "failed" not in y]


def main() -> None:
    """Measure, write, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--amounts", default=",".join(AMOUNTS))
    parser.add_argument("--quick", action="store_true", help="one seed, 60 %%; writes nothing")
    asked = parser.parse_args()
    started = datetime.now().astimezone()
    amounts = ("0.6",) if asked.quick else tuple(asked.amounts.split(","))
    raw: dict[str, Any] = {"found": measure(1 if asked.quick else asked.seeds, amounts)}
    raw |= machine.since(started)
    report.publish(raw, section, "prune-peers", keep=not asked.quick)


if __name__ == "__main__":
    main()
