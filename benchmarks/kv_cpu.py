"""Speed and memory of modicum's caches on a CPU, beside transformers' DynamicCache, in one run.

A random Llama (8 layers, hidden 512, fp32) takes in a prompt of random tokens under every policy. What is
published is ratios of times taken in turns; docs/benchmarks.md says how to read them. `--quick` checks in a
minute or two that all of it runs, and writes only where it is told to.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import graphs
import machine
import peak
import report
import speed
import storage
import torch
from page import write_section
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from subject import (
    COMPILED,
    FLOOR,
    PRIME,
    QUICK,
    Settings,
    all_policies,
    calibrate_heads,
    probe_heads,
    random_model,
    split,
)

import modicum

_DOCS = Path(__file__).resolve().parent.parent / "docs"
_BUSY = 0.5  # load average above which a run is not worth publishing


def run(settings: Settings, tell: speed.Tell) -> dict[str, Any]:
    """Measure everything; the raw results, ready for JSON."""
    model = random_model(settings.seed)
    if any("razor" in policy for policy in settings.policies):
        probe_heads(model)
    if "learned" in settings.policies:
        calibrate_heads(model)
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    prefills, stored, caches = speed.prefills(model, settings, tell)
    memory = {policy: storage.measure(cache, settings.chunk) for policy, cache in caches.items()}
    decodes, copies = speed.decodes(model, settings, stored, caches, tell)
    compiled = graphs.decodes(model, settings, tell)
    for cache in caches.values():
        cache.check_integrity()
    token_nbytes = stored.token_nbytes
    del model, stored, caches
    processes = []
    for policy, tokens in _processes(settings):
        processes.append(peak.in_fresh_process(policy, tokens, settings))
        tell(f"process: {policy}, {tokens:,} tokens")
    return {
        "prefill": prefills,
        "decode": decodes,
        "compiled": compiled,
        "copy_bandwidth": copies,
        "weights_nbytes": weights,
        "token_nbytes": token_nbytes,
        "memory": memory,
        "processes": processes,
    }


def _processes(settings: Settings) -> list[tuple[str, int]]:
    return [(PRIME, settings.tokens), (PRIME, settings.long_tokens), (peak.FULL, settings.tokens)]


def _work(settings: Settings) -> int:
    """Pieces of work that `run` tells of."""
    rounds = speed.prefill_rounds(settings)
    blocks = sum(map(len, speed.decode_groups(settings))) * (settings.repeats + 1)
    return len(rounds) + sum(map(len, rounds)) + blocks + len(settings.compiled) + len(_processes(settings))


def _settings(asked: argparse.Namespace) -> Settings:
    base = QUICK if asked.quick else Settings()
    names = ("tokens", "budget", "chunk", "repeats", "block", "threads")
    given: dict[str, Any] = {name: getattr(asked, name) for name in names}
    known = all_policies()
    chosen = asked.policies.split(",") if asked.policies else list(known)
    for name in chosen:
        modicum.parse_policy(split(name)[0])
    # The two that others are compared with are always there.
    chosen = [PRIME, *(name for name in chosen if name not in (PRIME, FLOOR)), FLOOR]
    given |= {"policies": tuple(dict.fromkeys(chosen))}
    given |= {"compiled": tuple(name for name in COMPILED if name in chosen)}
    return replace(base, **{k: v for k, v in given.items() if v is not None})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, help="length of the prompt")
    parser.add_argument("--budget", type=int, help="slots per KV head")
    parser.add_argument("--chunk", type=int, help="tokens taken in at a time")
    parser.add_argument("--policies", help="names with commas between; default: all")
    parser.add_argument("--repeats", type=int, help="rounds of decode blocks; a third as many of prefills")
    parser.add_argument("--block", type=int, help="tokens decoded at a turn")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--quick", action="store_true", help="small settings, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="PATH", help="raw results; default docs/benchmarks.json")
    parser.add_argument(
        "--markdown", type=Path, metavar="PATH", help="page whose section is rewritten; docs/benchmarks.md"
    )
    return parser


def main() -> None:
    """Measure, write, and print the tables."""
    asked = _parser().parse_args()
    settings = _settings(asked)
    torch.set_num_threads(settings.threads)
    console = Console(stderr=True)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if load is not None and load > _BUSY:
        console.print(f"warning: the machine is busy (load average {load:.2f}): the times will be noisy")
    started = datetime.now().astimezone()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("warming up", total=_work(settings))
        results = run(settings, lambda what: bar.update(task, advance=1, description=what))
    raw = {
        **machine.since(started),
        "load_before": load,
        "settings": {**asdict(settings), "long_tokens": settings.long_tokens},
        **results,
    }
    section = report.section(raw)
    default = (None, None) if asked.quick else (_DOCS / "benchmarks.json", _DOCS / "benchmarks.md")
    if path := asked.json or default[0]:
        path.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    if path := asked.markdown or default[1]:
        write_section(path, "benchmarks", section)
    print(section)


if __name__ == "__main__":
    main()
