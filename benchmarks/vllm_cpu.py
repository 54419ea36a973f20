"""vLLM on a CPU, stock beside the plug-in, with pools of one size: requests at once, throughput, overhead.

Run by `make bench-vllm`, in an environment that has vLLM. Random weights, in the shape of kv_cpu.py's.
Each engine is a process of its own, one at a time, in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import fresh
import report

_ROOT = Path(__file__).resolve().parent.parent
_DOCS = _ROOT / "docs"
BLOCK, CHUNK = 32, 512
PROMPT, NEW, REQUESTS = 8_192, 256, 32
BUDGETS = (512, 1_024)
STEPS, BLOCK_OF_STEPS = 80, 16
POOL = 4 * (PROMPT + NEW)
"""Tokens: four whole requests."""


def folder() -> str:
    """A random Llama as a folder that vLLM can load."""
    from subject import random_model

    path = Path(tempfile.gettempdir()) / "modicum-vllm-bench"
    if not (path / "config.json").is_file():
        random_model().save_pretrained(path)
    return str(path)


def engine(model: str, budget: int | None, seqs: int, every: int = 1, compiled: bool = False) -> Any:
    """An engine over the pool: modicum's under a budget, or stock."""
    from vllm import LLM

    given: dict[str, Any] = {
        "model": model,
        "dtype": "float32",
        "block_size": BLOCK,
        "max_model_len": PROMPT + NEW,
        "max_num_seqs": seqs,
        "max_num_batched_tokens": CHUNK + seqs,
        "num_gpu_blocks_override": POOL // BLOCK + 1,
        "enable_prefix_caching": False,
        "async_scheduling": False,
        "skip_tokenizer_init": True,
        "enforce_eager": not compiled,
    }
    if budget is not None:
        ours = {"policy": "keydiff", "budget": budget, "chunk": CHUNK, "evict_every": every}
        given["additional_config"] = {"modicum": ours}
        given["scheduler_cls"] = "modicum.vllm.scheduler.ArenaScheduler"
    return LLM(**given)


def serve(model: str, budget: int | None, quick: bool, number: int, new: int) -> dict[str, Any]:
    """Requests that come at once: how many ran together, tokens a second, and each one's latency."""
    import torch
    from vllm import SamplingParams

    prompt = 1_024 if quick else PROMPT
    llm = engine(model, budget, REQUESTS)
    core = llm.llm_engine
    scheduler = core.engine_core.engine_core.scheduler
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for i in range(number):
        ids = torch.randint(1024, (prompt,), generator=generator).tolist()
        core.add_request(str(i), {"prompt_token_ids": ids}, params)
    together: list[int] = []
    latency: list[float] = []
    tokens = 0
    while core.has_unfinished_requests():
        for out in core.step():
            if out.finished:
                latency.append(time.perf_counter() - start)
                tokens += len(out.outputs[0].token_ids)
        together.append(len(scheduler.running))
    seconds = time.perf_counter() - start
    return {
        "together": max(together),
        "mean_together": statistics.mean(together),
        "tokens_per_second": tokens / seconds,
        "total_tokens_per_second": (tokens + number * prompt) / seconds,
        "seconds": seconds,
        "latency": latency,
    }


def step(
    model: str, budget: int, batch: int, against: int, every: int = 1, compiled: bool = False
) -> dict[str, Any]:
    """Decode steps of the plug-in at 700 tokens seen and of stock at `against`, step by step in turns: two
    engines in one process, so that what else the machine does falls on both. Seconds, and their ratio in each
    block of steps.
    """
    import torch
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True, detokenize=False)
    generator = torch.Generator().manual_seed(0)
    cores = []
    for limit, seen in ((None, against), (budget, 700)):
        core = engine(model, limit, batch, every, compiled).llm_engine
        for i in range(batch):
            ids = torch.randint(1024, (seen,), generator=generator).tolist()
            core.add_request(str(i), {"prompt_token_ids": ids}, params)
        while len(core.step()) < batch:
            pass
        cores.append(core)
    seconds: list[list[float]] = [[], []]
    for number in range(STEPS):
        for which in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            cores[which].step()
            seconds[which].append(time.perf_counter() - start)
    blocks = range(0, STEPS, BLOCK_OF_STEPS)
    stock, ours = ([sum(x[i : i + BLOCK_OF_STEPS]) for i in blocks] for x in seconds)
    return {
        "stock": statistics.mean(seconds[0]),
        "ours": statistics.mean(seconds[1]),
        "ratios": [a / b for a, b in zip(ours, stock, strict=True)],
    }


def alone(job: dict[str, Any]) -> dict[str, Any]:
    """A job in a process of its own."""
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    return fresh.answer(Path(__file__).name, ["--job", json.dumps(job)], **environment)


KINDS: dict[str, dict[str, Any]] = {
    "nothing goes": {"budget": 1024, "against": 700},
    # A step of stock attends to as many tokens as the budget holds.
    "one goes": {"budget": 512, "against": 512 - 45},
    "16 at a time": {"budget": 512, "against": 512 - 45, "every": 16},
    "one goes, compiled": {"budget": 512, "against": 512 - 45, "compiled": True},
}
BATCHES = (1, 8)


def serve_all(quick: bool, rounds: int, requests: int, new: int) -> list[dict[str, Any]]:
    """Requests served, stock and plug-in in turns."""
    served: list[dict[str, Any]] = []
    for number in range(rounds):
        for budget in (None, *((256,) if quick else BUDGETS)):
            job = {"what": "serve", "model": folder(), "budget": budget, "quick": quick}
            found = alone({**job, "number": requests, "new": new})
            served.append({"budget": budget, "round": number, **found})
            print(f"served: round {number}, {budget}", file=sys.stderr, flush=True)
    return served


def step_all(repeats: int) -> list[dict[str, Any]]:
    """Decode steps of each kind, stock beside plug-in."""
    steps: list[dict[str, Any]] = []
    for number in range(repeats):
        for batch in BATCHES:
            for name, how in KINDS.items():
                found = alone({"what": "step", "model": folder(), "batch": batch, **how})
                steps.append({"name": name, "batch": batch, "round": number, **found})
            print(f"steps: round {number}, batch {batch}", file=sys.stderr, flush=True)
    return steps


def spread(values: list[float], form: str) -> str:
    """The median, and from where to where."""
    middle, low, high = (format(x, form) for x in (statistics.median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low}–{high})"


def section(raw: dict[str, Any]) -> str:
    """The tables, markers left out."""
    m = raw["machine"]
    head = ["", "most at once", "mean", "tokens/s", "with prompts", "p50", "p95", "÷ stock's tokens/s"]
    rows = []
    rounds = {x["round"]: x["tokens_per_second"] for x in raw["served"] if x["budget"] is None}
    for budget in dict.fromkeys(x["budget"] for x in raw["served"]):
        all_of_it = [x for x in raw["served"] if x["budget"] == budget]
        late = sorted(seconds for x in all_of_it for seconds in x["latency"])
        rows.append(
            [
                "stock" if budget is None else f"budget {budget:,}",
                f"{max(x['together'] for x in all_of_it)}",
                spread([x["mean_together"] for x in all_of_it], ".1f"),
                spread([x["tokens_per_second"] for x in all_of_it], ".1f"),
                spread([x["total_tokens_per_second"] for x in all_of_it], ",.0f"),
                f"{late[len(late) // 2]:.0f} s",
                f"{late[min(len(late) - 1, int(0.95 * len(late)))]:.0f} s",
                spread([x["tokens_per_second"] / rounds[x["round"]] for x in all_of_it], ".2f"),
            ]
        )
    over = ["", *(f"batch {batch}{what}" for batch in BATCHES for what in (", ms", " ÷ stock"))]
    more = []
    for name in KINDS:
        row = [name]
        for batch in BATCHES:
            some = [x for x in raw["steps"] if (x["name"], x["batch"]) == (name, batch)]
            row.append(f"{statistics.median(x['ours'] for x in some) * 1e3:.1f}")
            row.append(spread([ratio for x in some for ratio in x["ratios"]], ".2f"))
        more.append(row)
    text = (
        f"Measured {raw['date']} in {raw['minutes']} minutes on {m['cores']} cores ({m['processor']}), vLLM "
        f"{raw['vllm']}, KeyDiff, a pool of {POOL:,} tokens in pages of {BLOCK}, chunk {CHUNK}: "
        f"{raw['requests']} requests of {PROMPT:,} + {raw['new']} tokens that come at once; "
        f"{1 + max(rounds)} rounds in turns, medians and from where to where; latencies of all rounds."
    )
    note = (
        "**A decode step** at 700 tokens seen, in turns with stock's over as many tokens attended to, in one "
        f"process (median and range of blocks of {BLOCK_OF_STEPS} steps): where nothing goes (budget 1,024), "
        "and where each request lets a token of each head and layer go at each step (budget 512), or 16 at "
        f"each sixteenth. Measured {raw['steps_date']}."
    )
    return "\n\n".join([text, report.table(head, rows), note, report.table(over, more)])


def main() -> None:
    """Measure, write, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small; prints and writes nothing")
    parser.add_argument("--repeats", type=int, default=1, help="of the steps")
    parser.add_argument("--rounds", type=int, default=2, help="of requests served")
    parser.add_argument("--steps-only", action="store_true", help="keep what was measured of requests")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--new", type=int, default=NEW, help="tokens of each answer")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.job:
        job = json.loads(asked.job)
        run = {"serve": serve, "step": step}[job.pop("what")]
        print(json.dumps(run(**job)))
        return
    import machine

    from modicum.vllm.version import installed

    started = datetime.now().astimezone()
    path = _DOCS / "benchmarks_vllm.json"
    repeats, rounds = (1, 1) if asked.quick else (asked.repeats, asked.rounds)
    if asked.steps_only:
        raw = json.loads(path.read_text(encoding="utf-8"))
    else:
        raw = {"vllm": installed(), "requests": asked.requests, "new": asked.new}
        raw["served"] = serve_all(asked.quick, rounds, asked.requests, asked.new)
        raw |= machine.since(started)
    raw["steps"], raw["steps_date"] = step_all(repeats), f"{started:%Y-%m-%d}"
    report.publish(raw, section, "vllm", keep=not asked.quick)


if __name__ == "__main__":
    main()
