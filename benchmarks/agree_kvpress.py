"""Does modicum keep what kvpress keeps? The same tiny random models, prompts and budgets through both.

Each side runs in its own environment, as kvpress 0.5.5 needs transformers < 5.3 and wraps attention functions
when it is imported:

    python -m venv .venv-kvpress
    .venv-kvpress/bin/pip install torch==2.13.0
    .venv-kvpress/bin/pip install kvpress==0.5.5 transformers==5.2.0
    python benchmarks/agree_kvpress.py --peer .venv-kvpress/bin/python

One-shot prefill (our chunk holds the prompt), no sinks and no recent tokens beyond what a policy itself
protects, and a ratio with which int(n · (1 − ratio)) is the budget. Where a rule differs on purpose, the
press is run again with that one rule changed (`agree_peer.py`); what then still differs is a near tie or a
defect.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from agree_facts import SETTINGS, byte_tasks, measure_bytes, measure_padding, padded_tasks
from agree_models import Task, Tiny, random_ids, write_tasks
from agree_ours import CASES, SNAPKV, TOKENS, WINDOW, fill, kept_by
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import modicum
from modicum.compat import cache_kwargs

_BUDGETS = (25, 64, 80, 96, 144, 240)
_NEAR = 1e-5  # scores nearer than this, relative to their size, are a tie in fp32


_MATCHED = ((64, 3, 2), (96, 10, 4), (144, 16, 6))
"""Budget, our β and their β with which PyramidKV gives each layer as much on both sides."""


@torch.no_grad()
def full_keys(model: PreTrainedModel, ids: list[list[int]]) -> list[Tensor]:
    """The keys of each layer in transformers' own cache."""
    modicum.detach(model)
    cache = DynamicCache()
    model(torch.tensor(ids), **cache_kwargs(model, cache), use_cache=True, logits_to_keep=1)
    return [layer.keys for layer in cache.layers]


def agreement(ours: list[Any], theirs: list[Any], uneven: bool) -> tuple[int, int]:
    """Entries (layer, head, position) that both keep, of how many that they keep; one row.

    uneven: the two may keep different numbers of entries (PyramidKV's layer budgets).
    """
    pairs = [
        (set(a), set(b))
        for layer, other in zip(ours, theirs, strict=True)
        for a, b in zip(layer[0], other[0], strict=True)
    ]
    total = sum(len(b) for _, b in pairs)
    if not uneven and sum(len(a) for a, _ in pairs) != total:
        raise RuntimeError("the two sides keep different numbers of entries")
    return sum(len(a & b) for a, b in pairs), total


def near_ties(ours: list[Any], theirs: list[Any], scores: list[Tensor], across: bool) -> int:
    """Of the entries that they keep and we do not, those whose score ties with what we keep instead.

    across: heads compete, so that the exchange may be with another head.
    """
    count = 0
    for layer, other, score in zip(ours, theirs, scores, strict=True):
        heads = range(len(layer[0]))
        gained = {h: [float(score[0, h, i]) for i in set(layer[0][h]) - set(other[0][h])] for h in heads}
        every = [x for own in gained.values() for x in own]
        for h in heads:
            rivals = every if across else gained[h]
            for i in set(other[0][h]) - set(layer[0][h]):
                own = float(score[0, h, i])
                count += any(abs(own - x) <= _NEAR * max(abs(own), abs(x)) for x in rivals)
    return count


class Peer:
    """What kvpress' side told."""

    def __init__(self, folder: Path, python: str, tasks: list[Task]) -> None:
        for model in {task.model for task in tasks}:
            model.write(folder)
        write_tasks(tasks, folder / "tasks.json")
        script = Path(__file__).with_name("agree_peer.py")
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run([python, str(script), str(folder)], check=True, env=env)
        told = json.loads((folder / "peer.json").read_text(encoding="utf-8"))
        self.versions: dict[str, str] = told["versions"]
        self.results: dict[str, Any] = told["results"]
        self._tensors = load_file(folder / "peer.safetensors")

    def tensors(self, prefix: str) -> list[Tensor]:
        """One tensor per layer."""
        return [self._tensors[f"{prefix}/{i}"] for i in range(3) if f"{prefix}/{i}" in self._tensors]


def models(seeds: int) -> list[Tiny]:
    """Random Llamas and Qwen3s with grouped queries."""
    llamas = [Tiny("llama", seed) for seed in range(seeds)]
    return llamas + [Tiny("qwen3", seed, heads=6, head_dim=32) for seed in range(seeds)]


def agreement_tasks(seeds: int) -> list[Task]:
    """Every case, model and budget."""
    tasks = []
    for tiny in models(seeds):
        ids = random_ids(1, TOKENS, [0], tiny.seed)
        for press in dict.fromkeys(press for case in CASES for _, press in case.presses):
            for budget in _BUDGETS:
                tasks.append(Task(f"{press}/{tiny.name}/{budget}", press, tiny, ids, [0], budget, WINDOW))
        for budget, _, beta in _MATCHED:
            for press in ("pyramidkv", "pyramidkv-edges"):
                key = f"{press}-matched/{tiny.name}/{budget}"
                tasks.append(Task(key, press, tiny, ids, [0], budget, WINDOW, beta))
    return tasks


def compare(title: str, change: str, runs: list[tuple[list[Any], str]], peer: Peer, across: bool) -> Any:
    """One line of the table: what both keep, over the runs (what ours kept, key of theirs)."""
    both = total = ties = 0
    shares = []
    for ours, key in runs:
        theirs = peer.results[key]["kept"]
        same, entries = agreement(ours, theirs, uneven=title == "PyramidKV")
        both, total = both + same, total + entries
        shares.append(same / entries)
        ties += near_ties(ours, theirs, peer.tensors(key), across)
    return {
        "policy": title,
        "press": change,
        "runs": len(runs),
        "entries": total,
        "share": both / total,
        "least": min(shares),
        "different": total - both,
        "near_ties": ties,
    }


def measure_agreement(folder: Path, peer: Peer, seeds: int) -> list[Any]:
    """Lines for every case: as it is, and with rules changed."""
    loaded = {tiny: tiny.load(folder) for tiny in models(seeds)}
    lines = []

    def ours(tiny: Tiny, policy: str, budget: int, **settings: int) -> list[Any]:
        ids = random_ids(1, TOKENS, [0], tiny.seed)
        return kept_by(fill(loaded[tiny], policy, ids, [0], budget, **settings))

    grid = [(tiny, budget) for tiny in loaded for budget in _BUDGETS]
    for case in CASES:
        kept = [ours(tiny, case.policy, budget, n_sink=case.n_sink) for tiny, budget in grid]
        for change, press in case.presses:
            keys = [f"{press}/{tiny.name}/{budget}" for tiny, budget in grid]
            runs = list(zip(kept, keys, strict=True))
            lines.append(compare(case.title, change, runs, peer, across=press.startswith("adakv")))
        guarded = [(tiny, budget) for tiny, budget in grid if budget >= 64]
        kept = [ours(tiny, case.policy, budget, n_sink=4, recent=32) for tiny, budget in guarded]
        keys = [f"{case.press}/{tiny.name}/{budget}" for tiny, budget in guarded]
        runs = list(zip(kept, keys, strict=True))
        lines.append(compare(case.title, "our default protection", runs, peer, across=True))
    for change, press in (("equal layer budgets", "pyramidkv"), ("and edges", "pyramidkv-edges")):
        runs = [
            (
                ours(tiny, f"pyramidkv(base={SNAPKV}, beta={beta})", budget),
                f"{press}-matched/{tiny.name}/{budget}",
            )
            for tiny in loaded
            for budget, beta, _ in _MATCHED
        ]
        lines.append(compare("PyramidKV", change, runs, peer, across=False))
    return lines


def show(results: dict[str, Any]) -> str:
    """The tables as Markdown."""
    lines = [
        "| policy | press | agree | least | different | of them near ties |",
        "|---|---|---|---|---|---|",
    ]
    for r in results["agreement"]:
        lines.append(
            f"| {r['policy']} | {r['press']} | {r['share']:.4f} | {r['least']:.4f} | {r['different']:,} of "
            f"{r['entries']:,} | {r['near_ties']} |"
        )
    lines += ["", "| policy | nominal | modicum | kvpress |", "|---|---|---|---|"]
    for r in results["bytes"]:
        lines.append(f"| {r['policy']} | {r['nominal']:.3f} | {r['modicum']:.3f} | {r['kvpress']:.3f} |")
    lines += [
        "",
        "| policy | modicum: pads | as alone | kvpress: pads | as alone |",
        "|---|---|---|---|---|",
    ]
    for r in results["padding"]:
        cells = [r[f"{side}_{what}"] for side in ("modicum", "kvpress") for what in ("pads", "same")]
        lines.append(f"| {r['policy']} | " + " | ".join(f"{x:.3f}" for x in cells) + " |")
    return "\n".join(lines)


def measure(python: str, seeds: int) -> dict[str, Any]:
    """Both sides, all tables."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peer = Peer(folder, python, agreement_tasks(seeds) + byte_tasks() + padded_tasks())
        apart = 0.0
        for tiny in models(seeds):
            mine = full_keys(tiny.load(folder), random_ids(1, TOKENS, [0], tiny.seed))
            for a, b in zip(mine, peer.tensors(f"full/{tiny.name}"), strict=True):
                apart = max(apart, float((a - b).abs().max()))
        return {
            "date": date.today().isoformat(),
            "versions": {
                "modicum": {
                    "modicum": modicum.__version__,
                    "transformers": version("transformers"),
                    "torch": version("torch"),
                },
                "kvpress": peer.versions,
            },
            "settings": {
                "tokens": TOKENS,
                "window": WINDOW,
                "budgets": _BUDGETS,
                "models": [tiny.name for tiny in models(seeds)],
                **SETTINGS,
            },
            "full_cache_keys_apart": apart,
            "agreement": measure_agreement(folder, peer, seeds),
            "bytes": measure_bytes(folder, peer.results),
            "padding": measure_padding(folder, peer.results),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peer", default=".venv-kvpress/bin/python", help="Python with kvpress")
    parser.add_argument("--seeds", type=int, default=3, help="random models of each family")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = measure(args.peer, args.seeds)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(show(results))
    print(f"\nkeys of the full cache, greatest difference: {results['full_cache_keys_apart']:.1e}")


if __name__ == "__main__":
    main()
