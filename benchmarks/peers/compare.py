"""modicum beside kvpress and transformers: the same model, tokens, dtype and bytes; one joint table.

    python -m venv .venv-kvpress
    .venv-kvpress/bin/pip install torch==2.13.0
    .venv-kvpress/bin/pip install kvpress==0.5.5 transformers==5.2.0
    python -m venv .venv-transformers
    .venv-transformers/bin/pip install torch==2.13.0
    .venv-transformers/bin/pip install transformers==5.23.0 optimum-quanto
    python benchmarks/peers/compare.py --model FOLDER --out results/peers

Each system runs in its own environment, on token ids that are drawn here once. The question is hidden: the
context is read and compressed first. Every policy gets the bytes that a press holds at the same share of
tokens. Samples are done in blocks, all systems one after the other in each, so that what is there at any time
compares like with like; rows go to OUT/rows.jsonl, and what is there is not run again. What a system cannot
do is in OUT/refused.jsonl, with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from job import Job, Result, Setting
from joint import Joint
from ours import Case, bytes_per_token, first_logits, measure
from plan import FULL, METHODS, kvpress_settings, our_settings, transformers_settings

import modicum
from modicum.evaluation.fingerprint import fingerprint, sample_fingerprint
from modicum.evaluation.row import Cell, Row
from modicum.evaluation.runner import Prompt
from modicum.evaluation.store import Store
from modicum.generation.text import decode
from modicum.tasks import find_metric, parse_task

_TASKS = "niah_single_2:max_new_tokens=16,niah_multikey_1:keys=8,max_new_tokens=16,vt:hops=2"
_LOGITS = 2  # samples of each task whose logits are compared
_HERE = Path(__file__).parent


class Comparison:
    """The systems, the samples, and the folder that holds what is done."""

    def __init__(self, args: argparse.Namespace, store: Store) -> None:
        self.args, self.store = args, store
        self.writing = threading.Lock()
        self.model, self.tokenizer = modicum.load(args.model, dtype="float32", device="cpu")
        self.tasks = [task for text in args.tasks for task in parse_task(text)]
        methods = [m for m in METHODS if m.title in args.methods]
        self.settings = {
            "kvpress": kvpress_settings(methods, args.shares),
            "transformers": transformers_settings(args.shares, args.chunk),
            "modicum": our_settings(methods, args.shares, args.chunk),
        }
        self.peers = {
            "kvpress": (args.kvpress, _HERE / "kvpress_eval.py"),
            "transformers": (args.transformers, _HERE / "transformers_eval.py"),
        }
        self.refused: set[tuple[str, str, str, int | None]] = set()
        # Found out again: what was missing may have been installed.
        (args.out / "refused.jsonl").unlink(missing_ok=True)

    def note(self, name: str, **values: Any) -> None:
        """A line to one of the files beside the rows."""
        with open(self.args.out / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def cases(self, indices: range) -> Iterator[Case]:
        """The samples of all tasks."""
        for index in indices:
            for task in self.tasks:
                sample = task.sample(index, self.args.length, self.tokenizer, self.args.seed)
                yield Case(task.name, sample, Prompt.of(sample, self.model, self.tokenizer))

    def admit(self) -> None:
        """Refuse to mix with rows of another model."""
        marks = {
            f"{case.task}, length {self.args.length}, seed {self.args.seed}": sample_fingerprint(case.sample)
            for case in self.cases(range(1))
        }
        grid = {"tasks": [t.name for t in self.tasks], "shares": self.args.shares, "chunk": self.args.chunk}
        name = f"{self.args.name} float32"
        self.store.admit({name: fingerprint(self.model, self.tokenizer)}, marks, grid, {"peers": True})

    def cell(self, system: str, setting: Setting, case: Case) -> Cell:
        """What a row is filed under."""
        return Cell(
            system=system,
            model=self.args.name,
            policy=setting.policy,
            budget=setting.budget,
            task=case.task,
            length=self.args.length,
            question="hidden",
            chunk=setting.chunk,
            seed=self.args.seed,
            dtype="float32",
        )

    def missing(self, system: str, cases: list[Case]) -> list[tuple[int, int]]:
        """Places of samples and settings that are not done; a system's settings one after the other."""
        with self.writing:
            rows = [row for row in self.store.rows if row.cell.system == system]
        done = {(r.cell.policy, r.cell.budget, r.cell.chunk, r.cell.task, r.index) for r in rows}
        return [
            (i, j)
            for i, case in enumerate(cases)
            for j, s in enumerate(self.settings[system])
            if (system, s.policy, s.budget, s.chunk) not in self.refused
            and (s.policy, s.budget, s.chunk, case.task, case.sample.index) not in done
        ]

    # ------------------------------------------------------------------ running

    def run_ours(self, cases: list[Case]) -> None:
        """modicum's rows, in this process."""
        for i, j in self.missing("modicum", cases):
            case, setting = cases[i], self.settings["modicum"][j]
            metric = find_metric(case.sample.metric)
            cell = self.cell("modicum", setting, case)
            row = measure(self.model, self.tokenizer, case, cell, setting, metric)
            if isinstance(row, str):
                self.refuse("modicum", setting, row)
                continue
            with self.writing:
                self.store.add(row)
            if setting.policy == FULL and case.sample.index < _LOGITS:
                chunk = setting.chunk or len(case.prompt.context)
                self.full("modicum", case, setting, first_logits(self.model, case, chunk).tolist())
        modicum.detach(self.model)

    def run_peer(self, system: str, cases: list[Case]) -> None:
        """A peer's rows, as it prints them."""
        wanted = self.missing(system, cases)
        python, script = self.peers[system]
        if not wanted or python is None:
            return
        asks = [case.ask(logits=case.sample.index < _LOGITS) for case in cases]
        ends = sorted(_ends(self.model, self.tokenizer))
        path = self.args.out / f"{system}.job.json"
        model = str(Path(self.model.config._name_or_path).resolve())
        Job(model, "float32", ends, asks, self.settings[system], wanted).write(path)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        env.pop("PYTHONPATH", None)
        with subprocess.Popen(
            [python, str(script), str(path)], stdout=subprocess.PIPE, text=True, env=env
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                self.take(system, cases, Result(**json.loads(line)))
        if process.returncode:
            raise SystemExit(f"{system} ended with {process.returncode}; what it said stands above")

    def take(self, system: str, cases: list[Case], result: Result) -> None:
        """A peer's result as a row."""
        case, setting = cases[result.ask], self.settings[system][result.setting]
        if result.refused:
            self.refuse(system, setting, result.refused)
            return
        sample = case.sample
        output = decode(self.tokenizer, result.tokens)
        seen = len(case.prompt.context) + len(case.prompt.question) + len(result.tokens) - 1
        extra = dict(result.extra)
        row = Row(
            cell=self.cell(system, setting, case),
            index=sample.index,
            score=float(find_metric(sample.metric)(output, sample.answers)),
            metric=sample.metric,
            output=output,
            answers=list(sample.answers),
            context_tokens=len(case.prompt.context),
            new_tokens=len(result.tokens),
            depth=sample.depth,
            held_bytes=result.held_bytes,
            context_bytes=result.context_bytes,
            peak_bytes=result.peak_bytes,
            full_bytes=seen * bytes_per_token(self.model),
            held_tokens=(result.held_tokens[0], result.held_tokens[1]),
            prefill_seconds=result.prefill_seconds,
            decode_seconds=result.decode_seconds,
            versions=extra.pop("versions"),
            extra={"question_tokens": len(case.prompt.question), "threads": 1, **extra},
        )
        with self.writing:
            self.store.add(row)
        if setting.policy == FULL and result.logits:
            self.full(system, case, setting, result.logits)

    def refuse(self, system: str, setting: Setting, reason: str) -> None:
        """Note, once, what a system cannot do."""
        key = (system, setting.policy, setting.budget, setting.chunk)
        if key not in self.refused:
            self.refused.add(key)
            self.note("refused.jsonl", system=system, **asdict(setting), reason=reason)

    def full(self, system: str, case: Case, setting: Setting, logits: list[float]) -> None:
        """Note the logits of a full cache."""
        self.note("full.jsonl", system=system, chunk=setting.chunk, sample=case.key, logits=logits)

    def run_block(self, cases: list[Case]) -> None:
        """All systems, one after the other; `together`: ours beside the peers, on another core."""
        with ThreadPoolExecutor(1) as beside:
            peers = beside.submit(lambda: [self.run_peer(system, cases) for system in self.peers])
            if not self.args.together:
                peers.result()
            self.run_ours(cases)
            peers.result()

    def run(self) -> None:
        """Block after block, until all is done or the time would not last for another block."""
        args, start, longest = self.args, time.perf_counter(), 0.0
        for first in range(0, args.limit, args.block):
            clock = time.perf_counter()
            if args.minutes is not None and clock - start + longest > 60 * args.minutes:
                print(f"{first} of {args.limit} samples of each task: the time is over", file=sys.stderr)
                return
            cases = list(self.cases(range(first, min(args.limit, first + args.block))))
            self.run_block(cases)
            longest = max(longest, time.perf_counter() - clock)
            print(
                f"samples {first}..{first + args.block - 1}: {time.perf_counter() - clock:.0f} s",
                file=sys.stderr,
            )


def _ends(model: Any, tokenizer: Any) -> set[int]:
    ends = model.generation_config.eos_token_id if model.generation_config else None
    found = set(ends) if isinstance(ends, list) else set() if ends is None else {ends}
    return found | ({tokenizer.eos_token_id} - {None})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", default="reference", help="embedded name or folder; kvpress must know its architecture")
    add("--name", help="what rows call the model; the last part of --model")
    add("--out", type=Path, default=Path("results/peers"), help="folder of rows.jsonl")
    add("--tasks", nargs="+", default=[_TASKS], help="task expressions")
    add("--length", type=int, default=2048, help="tokens of context, question and answer")
    add("--shares", type=float, nargs="+", default=[0.125, 0.25], help="of the context's tokens")
    titles = [method.title for method in METHODS]
    add("--methods", nargs="*", default=titles, choices=titles, help="all by default")
    add("--chunk", type=int, default=256, help="of our chunked prefill")
    add("--limit", type=int, default=20, help="samples of each task")
    add("--block", type=int, default=2, help="samples that each system does before the next one's turn")
    add("--together", action="store_true", help="ours beside the peers: two cores, rougher times")
    add("--minutes", type=float, help="begin no block that would end later")
    add("--seed", type=int, default=0)
    add("--kvpress", default=".venv-kvpress/bin/python", help="Python with kvpress")
    add("--transformers", default=".venv-transformers/bin/python", help="Python with optimum-quanto")
    add("--table-only", action="store_true", help="run nothing, write the table of what is there")
    add("--docs", type=Path, help="page whose part between the markers becomes the table")
    add("--json", type=Path, help="write the table's numbers here")
    args = parser.parse_args()
    args.name = args.name or Path(args.model).name
    return args


def main() -> None:
    args = _arguments()
    torch.set_num_threads(1)
    if not args.table_only:
        with Store(args.out) as store:
            comparison = Comparison(args, store)
            comparison.admit()
            comparison.run()
    joint = Joint.read(args.out)
    print(joint.markdown())
    if args.json:
        args.json.write_text(json.dumps(joint.to_dict(), indent=1) + "\n", encoding="utf-8")
    if args.docs:
        joint.write_into(args.docs)


if __name__ == "__main__":
    main()
