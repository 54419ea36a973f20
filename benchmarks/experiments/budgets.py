"""Answers kept at a few percent of the bytes: calibrated head budgets and heads alike, in 16, 8 and 4 bits.

    python benchmarks/experiments/budgets.py --model smollm2 --minutes 60     # goes on where it stopped
    python benchmarks/experiments/budgets.py --model smollm2 --group scores --tasks keys
    python benchmarks/experiments/budgets.py --quick                          # writes nothing

The question is hidden, the prompt is read in chunks of 512, and question and answer are held to the budget
too. Contexts of all cells are taken in turns, so that whatever there is when the time is over compares like
with like. Rows are kept in --folder; a later call with the same folder adds to them and renews the page.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from ablation import Ablation
from asking import ask, ruler
from budget_peers import PEERS, run_peer
from budget_rows import CHUNK, Row, read, results
from common import DOCS
from page import write_section
from torch.nn.functional import cross_entropy

import modicum
from modicum.generation.inputs import Block
from modicum.generation.reader import Reader
from modicum.kv.cache import use_head_scores
from modicum.kv.heads import probe
from modicum.kv.policy import Policy
from modicum.kv.registry import parse_policy

RECENT, BATCH = 16, 4
SCORES = ("keydiff", "manifoldkv", "compactor(window=16)", "replay", "learned")

Cell = tuple[str | Policy, str, str]
"""A policy, what its slots are stored in, and the budget."""


def cells(policies: Sequence[str | Policy], store: str, *budgets: str) -> list[Cell]:
    """Each policy at each budget."""
    return [(policy, store, budget) for policy in policies for budget in budgets]


FULL: Cell = ("full", "model", "full")
GROUPS: dict[str, list[Cell]] = {
    "auto": [
        FULL,
        *cells(["auto"], "model", "25%", "12.5%"),
        *cells(["auto"], "int8", "24%"),
        *cells(["auto"], "k8v4", "32%"),
        *cells(["keydiff"], "model", "12.5%"),
    ],
    "bytes": [
        *cells(["auto"], "model", "50%", "6.25%"),
        *cells(["auto"], "int8", "48%", "12%"),
        *cells(["auto"], "k8v4", "16%", "8%"),
        *cells(["auto"], "int4", "45%", "22%", "11%"),
    ],
    "shares": [FULL, *cells(["auto"], "model", "50%", "6.25%"), *cells(["auto"], "k8v4", "16%", "8%")],
    "least": [*cells(["auto"], "k8v4", "5%"), *cells(["auto"], "int4", "11%", "6.5%")],
    "scores": [
        FULL,
        *cells([f"calibrated+{score}" for score in SCORES], "model", "25%", "12.5%"),
    ],
    "alike": cells(
        ["learned", "keydiff", "manifoldkv", "snapkv(window=16)", "streamingllm", "razor(base=keydiff)"],
        "model",
        "25%",
        "12.5%",
    ),
    "papers": [
        FULL,
        *cells(
            [
                *("keydiff", "snapkv", "tova(heads=each)", "h2o", "streamingllm"),
                *("ahakv", Ablation(step=False), Ablation(values=False), Ablation(recent=False)),
                *("caote+snapkv", "caote+tova(heads=each)", "caote+h2o"),
                *(f"razor(base=keydiff,induction={part})" for part in (0.07, 0.14, 0.28, 0.42)),
            ],
            "model",
            "50%",
            "25%",
        ),
    ],
}
"""Settings that are compared with each other; "shares": the fewest of "bytes" from a half to 3 %;
"papers": what the four papers say."""
TASKS = {
    "single": "niah_single_2:max_new_tokens=16",
    "keys": "niah_multikey_1:each=true,max_new_tokens=16",
    "eight": "niah_multikey_1:keys=8,each=true,max_new_tokens=16",
    "queries": "niah_multiquery:max_new_tokens=64",
    "answer": "niah_multikey_1:each=true,max_new_tokens=16",
}
"""RULER's single needle, one of four and one of eight keys (all asked for in turn), and four at once.

"answer": the four keys stand in a long answer of the model's: its tokens come one by one, as in decoding.
"""


def haystack_of(asked: argparse.Namespace) -> tuple[str, str]:
    """Its name in rows, and its setting behind a task's others."""
    if asked.haystack is None:
        return "", ""
    return Path(asked.haystack).stem, f",haystack={json.dumps(asked.haystack)}"


def run(asked: argparse.Namespace, contexts: int, path: Path) -> Iterator[Row]:
    """The rows that are missing, some contexts at a time, until there are all or the time is over."""
    end = time.monotonic() + 60 * asked.minutes
    model_name, length = asked.model, asked.length
    chunk = asked.chunk or length + 64  # of one shot
    model, tokenizer = modicum.load(model_name, dtype=asked.dtype)
    hidden_in, text = haystack_of(asked)
    wide = model.dtype.itemsize / 2
    if asked.group == "papers":  # RazorAttention's own probe draws special tokens, too
        use_head_scores(model, probe(model, exclude=tokenizer.all_special_ids))
    done = {(*row.key, row.context) for row in read(path)}
    for first in range(0, contexts, BATCH):
        for task in asked.tasks:
            made = None
            for policy, store, budget in GROUPS[asked.group]:
                name = str(parse_policy(policy))  # what auto stands for may change
                key = (model_name, length, task, hidden_in, name, store, budget, chunk)
                wanted = [i for i in range(first, min(first + BATCH, contexts)) if (*key, i) not in done]
                if not wanted:
                    continue
                if time.monotonic() > end:
                    return
                if made is None:
                    made = ruler(tokenizer, TASKS[task] + text, BATCH, length, 0, first=first)
                mine = [made[i - first] for i in wanted]
                room = budget if budget != "full" else length + 64
                saying = Saying() if task == "answer" else None
                got = ask(
                    model,
                    mine,
                    policy,
                    room,
                    chunk=chunk,
                    read=saying,
                    recent=RECENT,
                    store=store,
                    n_sink=0 if budget == "full" else 4,
                )
                losses = saying.losses if saying else [None] * len(mine)
                for i, context, right, loss, hits in zip(
                    wanted, mine, got.right, losses, got.tokens, strict=True
                ):
                    per = len(context.questions)
                    full = round(got.full_nbytes / wide)
                    held = got.nbytes if store != "model" else round(got.nbytes / wide)
                    yield Row(*key[:-1], i, per, right * per, held, full, loss, hits, chunk)


def made(asked: argparse.Namespace, contexts: int, path: Path) -> Iterator[Row]:
    """The missing rows: a peer's, where its environment is given, else modicum's."""
    for name in PEERS:
        if python := getattr(asked, name):
            haystack, setting = haystack_of(asked)
            model, tokenizer = modicum.load(asked.model, dtype=asked.dtype)
            known = {row.key for row in read(path)}
            for task in asked.tasks:
                found = ruler(tokenizer, TASKS[task] + setting, contexts, asked.length, 0)
                where = (asked.model, asked.length, task, haystack)
                yield from run_peer(name, python, model, found, where, known)
            return
    yield from run(asked, contexts, path)


class Saying:
    """Reads token by token, and notes the mean loss of each row's tokens."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def __call__(self, reader: Reader, block: Block) -> None:
        """The rows of a block, side by side."""
        width = block.ids.shape[1]
        valid = torch.ones_like(block.ids, dtype=torch.bool) if block.valid is None else block.valid
        total = torch.zeros(len(block.ids))
        for at in range(width):
            reader.forward(block.ids[:, at : at + 1], block.part(at, at + 1))
            if at + 1 < width:
                assert reader.transcript.logits is not None
                loss = cross_entropy(reader.transcript.logits.float(), block.ids[:, at + 1], reduction="none")
                total += loss * valid[:, at]
        self.losses += (total / (valid.sum(1) - 1)).tolist()


def main() -> None:
    """Run, and renew the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--dtype", default="auto", help="of the weights")
    parser.add_argument("--haystack", help="a text to hide needles in; else the sample text")
    parser.add_argument("--kvpress", metavar="PYTHON", help="of its environment: its presses, one shot")
    parser.add_argument("--transformers", metavar="PYTHON", help="likewise: its quantised caches, one shot")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="tokens read at a time; 0 reads all in one")
    parser.add_argument("--group", default="auto", choices=sorted(GROUPS))
    parser.add_argument("--tasks", nargs="+", default=["single", "keys"], choices=sorted(TASKS))
    parser.add_argument("--contexts", type=int, default=50, help="of each cell")
    parser.add_argument("--minutes", type=float, default=60, help="stop after so many; a later run goes on")
    parser.add_argument("--folder", type=Path, default=Path("results/budgets"), help="of the rows")
    parser.add_argument("--quick", action="store_true", help="one context; prints and writes nothing else")
    asked = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as passing:
        path = Path(passing if asked.quick else asked.folder) / "rows.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        contexts = 1 if asked.quick else asked.contexts
        for row in made(asked, contexts, path):
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")
            print(
                f"{row.task} {row.policy} {row.store} {row.budget}: context {row.context}, {row.right:g}",
                file=sys.stderr,
            )
        haystack, _ = haystack_of(asked)
        has_papers = asked.group == "papers"
        rows = [
            row
            for row in read(path)
            if (row.model, row.length, row.haystack) == (asked.model, asked.length, haystack)
        ]
        shown = {
            (str(parse_policy(policy)), store, budget)
            for name, group in GROUPS.items()
            if (name == "papers") == has_papers
            for policy, store, budget in group
        }
        text = results(
            rows,
            list(TASKS),
            lambda row: (
                (row.policy, row.store, row.budget) in shown
                or (not has_papers and row.policy.startswith(tuple(f"{name}:" for name in PEERS)))
            ),
            {str(parse_policy("auto")): "auto"},
        )
        where = f" of {haystack}" if haystack else ""
        text = f"**{asked.model}**, {asked.length} tokens{where}:\n\n{text}"
        print(text)
        if not asked.quick:
            page = "papers.md" if has_papers else "budgets.md"
            name = " ".join(filter(None, [asked.model, str(asked.length), haystack]))
            write_section(DOCS / page, name, text)


if __name__ == "__main__":
    main()
