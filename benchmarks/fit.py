r"""Fitting a model and its cache into a memory: `modicum fit` beside uniform choices and single levers of the
same bytes. One process, one thread, under an hour and a half for `reference`; resumable.

    python benchmarks/fit.py --work FOLDER                  # measures what rows.jsonl does not have
    python benchmarks/fit.py --work FOLDER --model smollm2 --context 2048 --batch 4 --probe-length 1024 \
        --probes 2 --questions 2 --stretches 2 --weights dense,50%,70%,85%       # hours
    python benchmarks/fit.py --work FOLDER --quick          # minutes, for a trial
    python benchmarks/fit.py --work FOLDER --docs           # writes docs/benchmarks_fit.json and the tables

Perplexity is of text that nothing was fitted to, and recall of questions that nothing was fitted to, hidden
while the context is read; both through the cache of the row, at the whole context.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import report
import torch
from measured_rows import append_row, processors, read_rows, work_folder, write_docs

import modicum
from modicum.evaluation.grid import HIDDEN
from modicum.evaluation.row import Cell
from modicum.evaluation.runner import Prompt, Reading, run
from modicum.fit import assembly
from modicum.fit.cache_option import CacheOption
from modicum.fit.fit_plan import FitPlan
from modicum.fit.fitter import Fitter
from modicum.fit.settings import FitSettings, Target
from modicum.fit.weight_option import WeightOption
from modicum.float32_products import float32_products
from modicum.kv.budget import format_size
from modicum.kv.calibration import calibrate
from modicum.kv.head_store import find_profile
from modicum.tasks import METRICS, parse_task
from modicum.weights.prune import prune

BUDGETS = (0.75, 0.5, 0.35, 0.25)
"""Of what the model takes as it is: dense weights and transformers' whole cache, both in 16 bits."""
HELD = 0.2
"""Of the sample text, at its end: perplexity is of it."""
TASKS = "niah_single_2:max_new_tokens=24,niah_multikey_1:keys=8,each=true,max_new_tokens=24"
MOST = 0.98
FIT, FINETUNED = "modicum fit", "modicum fit --finetune"


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        context: tokens of a sequence.
        batch: sequences whose caches count; they are read one after the other.
        questions: contexts of each task; of niah_multikey_1 each has 8 questions.
        stretches: of text that perplexity is of.
    """

    model: str = "reference"
    context: int = 4096
    batch: int = 1
    questions: int = 4
    stretches: int = 6


@dataclass(frozen=True)
class Way:
    """A way to spend a memory."""

    name: str
    plan: FitPlan
    sparsity: float | None = None
    """Of all weights, for the lever of the weights alone."""


class Bench:
    """A reference, its fitter, and what is measured of a model."""

    def __init__(self, work: Path, scale: Scale, settings: FitSettings, finetunes: bool = False) -> None:
        self.work, self.scale, self.finetunes = work, scale, finetunes
        self.model, self.tokenizer = modicum.load(scale.model, dtype="bfloat16", device="cpu")
        self.weights = copy.deepcopy(self.model.state_dict())
        learned, self.held = _texts(work)
        target = Target(1, scale.context, scale.batch)
        library = work / f"library-{scale.model}"
        self.fitter = Fitter(
            self.model, self.tokenizer, learned, target, settings, library=library, progress=_tell
        )
        self.fitter.build()
        self.dense_nbytes = self.fitter.planner.dense_nbytes(target)
        self._pruned: dict[str, list[torch.Tensor]] = {}

    def restore(self) -> None:
        """The model as it was."""
        self.model = self.fitter.model
        self.model.load_state_dict(self.weights)

    def evaluate(self, store: str, budget: str, policy: str = "auto") -> dict[str, float]:
        """Perplexity and recall of the model as it is now."""
        scale = self.scale
        losses, tokens = [], []
        text = parse_task(f'text:stride=96,path="{self.held}"')[0]
        places = [round(i * (len(text) - 1) / scale.stretches) for i in range(1, scale.stretches + 1)]
        for index in places:
            row, count = self._row(text, index, store, budget, policy)
            losses.append(row * count)
            tokens.append(count)
        found = {"perplexity": math.exp(sum(losses) / sum(tokens))}
        scores: list[float] = []
        for task in parse_task(TASKS):
            each = int(getattr(task, "questions", 1))
            own = []
            number = scale.questions * (4 if each == 1 else 1)
            for context in range(number):
                own += self._answers(task, context * each, each, store, budget, policy)
            found[task.name.split(":")[0]] = sum(own) / len(own)
            scores += own
        return found | {"recall": sum(scores) / len(scores), "questions": len(scores)}

    def _cell(self, task: Any, store: str, budget: str, policy: str) -> Cell:
        return Cell(
            "modicum", self.scale.model, policy, budget, task.name, self.scale.context, HIDDEN, 512, 0,
            "bfloat16", 4, 32, 1, "original", store,
        )  # fmt: skip

    def _row(self, task: Any, index: int, store: str, budget: str, policy: str) -> tuple[float, int]:
        sample = task.sample(index, self.scale.context, self.tokenizer, 0)
        prompt = Prompt.of(sample, self.model, self.tokenizer)
        cell = self._cell(task, store, budget, policy)
        return run(self.model, self.tokenizer, sample, prompt, cell, None).score, len(prompt.target)

    def _answers(
        self, task: Any, first: int, number: int, store: str, budget: str, policy: str
    ) -> Iterator[float]:
        reading = None
        for index in range(first, first + number):
            sample = task.sample(index, self.scale.context, self.tokenizer, 0)
            prompt = Prompt.of(sample, self.model, self.tokenizer)
            cell = self._cell(task, store, budget, policy)
            if reading is None:
                reading = Reading.of(self.model, prompt, cell, prompt.total(sample))
            judge = METRICS[sample.metric]
            yield run(self.model, self.tokenizer, sample, prompt, cell, judge, reading=reading).score

    def ways(self, memory: int) -> Iterator[Way | str]:
        """Each way to spend a memory; a name alone where it cannot be spent so."""
        planner, loss = self.fitter.planner, self.fitter.loss
        target = Target(memory, self.scale.context, self.scale.batch)
        yield FIT
        if self.finetunes:
            yield FINETUNED
        for option in self.fitter.library.options:
            found = [planner.uniform(target, loss, option.name, s) for s in planner.stores]
            plans = [plan for plan in found if plan is not None]
            name = f"uniform, {option.name}"
            if not plans:
                yield name
                continue
            yield Way(name, min(plans, key=lambda plan: plan.predicted))
        alone = planner.uniform(target, loss, "dense", "model")
        yield "cache alone" if alone is None else Way("cache alone", alone)
        yield self._bits(memory) or "bits alone"
        yield self._weights(memory) or "weights alone"

    def _bits(self, memory: int) -> Way | None:
        """Dense weights and all tokens, in the most bits that fit."""
        planner = self.fitter.planner
        weights = self._dense_weights()
        for store in ("int8", "k8v4", "int4"):
            cache = CacheOption(store, self.scale.context, self.scale.context)
            if weights + self.scale.batch * planner.cache_nbytes(cache) <= memory:
                options = {part.name: "dense" for part in self.fitter.library.parts}
                plan = FitPlan(options, cache, weights, planner.cache_nbytes(cache), math.nan)
                return Way("bits alone", plan)
        return None

    def _weights(self, memory: int) -> Way | None:
        """The least sparsity of all weights at which they fit beside the whole cache in 16 bits."""
        planner = self.fitter.planner
        cache = CacheOption("model", self.scale.context, self.scale.context)
        room = memory - self.scale.batch * planner.cache_nbytes(cache)
        for percent in range(2, round(100 * MOST) + 1):
            nbytes = planner.fixed_nbytes + self._packed(percent / 100)
            if nbytes <= room:
                options = {part.name: f"{percent}%" for part in self.fitter.library.parts}
                plan = FitPlan(options, cache, nbytes, planner.cache_nbytes(cache), math.nan)
                return Way("weights alone", plan, percent / 100)
        return None

    def _dense_weights(self) -> int:
        planner = self.fitter.planner
        return planner.fixed_nbytes + sum(
            planner.variants(p.name)[0].nbytes for p in self.fitter.library.parts
        )

    def _packed(self, sparsity: float) -> int:
        from modicum.fit.part import held_nbytes

        total = 0
        for part in self.fitter.library.parts:
            for matrix in part.matrices:
                rows, width = matrix.weight.shape
                total += held_nbytes(rows, width, rows * (width - int(width * sparsity + 1e-6)), 2)
        return total

    def _prune(self, way: Way) -> None:
        """Prune the model in place. Weights of a uniform plan are kept, as other budgets have the same."""
        matrices = [matrix for part in self.fitter.library.parts for matrix in part.matrices]
        name = next(iter(way.plan.options.values()))
        with torch.no_grad():
            if way.sparsity is not None:
                how: Any = self.fitter.settings.pruning(WeightOption.parse(f"{100 * way.sparsity:g}%"))
                prune(self.model, self.fitter.library.ids, how)
            elif name in self._pruned:
                for matrix, weight in zip(matrices, self._pruned[name], strict=True):
                    matrix.weight.copy_(weight)
            else:
                assembly.in_order(self.fitter.library, way.plan.options)
                self._pruned[name] = [matrix.weight.clone() for matrix in matrices]

    def spend(self, way: Way | str, memory: int) -> dict[str, Any]:
        """Assemble a way and measure it."""
        started = time.perf_counter()
        try:
            if isinstance(way, str):
                if way not in (FIT, FINETUNED):
                    return {"fits": False}
                found = self.fitter.plan(memory)
                made = self.fitter.apply(found[0], found)
                plan = made.plan
                more = {"loss": made.loss, "in_order": made.in_order, "how": plan.how}
                if way == FINETUNED:
                    before = self.evaluate(plan.cache.store, f"{plan.cache_nbytes} B")
                    more["loss_before"], more["before"] = made.loss, before
                    state = self.work / f"finetuning-{self.scale.model}-{memory}"
                    self.model = self.fitter.finetuned(made, self.scale.model, state)
                    more["loss"] = made.loss
            else:
                plan, more = way.plan, {}
                self._prune(way)
                own = find_profile(self.model)
                if own is None or not own.weights:
                    calibrate(self.model, self.tokenizer)
            made_row = self.evaluate(plan.cache.store, f"{plan.cache_nbytes} B")
        finally:
            self.restore()
        return {
            "fits": True,
            **more,
            **made_row,
            "bytes": plan.nbytes(self.scale.batch),
            "weights_bytes": plan.weights_nbytes,
            "cache_bytes": self.scale.batch * plan.cache_nbytes,
            "store": plan.cache.store,
            "tokens": plan.cache.tokens,
            "options": list(plan.options.values()),
            "seconds": time.perf_counter() - started,
        }


def _texts(work: Path) -> tuple[Path, Path]:
    """Files of the sample text: what is fitted to, and what is held back."""
    text = modicum.sample_text()
    cut = text.rindex("\n\n", 0, round((1 - HELD) * len(text)))
    learned, held = work / "learned.txt", work / "held.txt"
    learned.write_text(text[:cut], encoding="utf-8")
    held.write_text(text[cut:].strip(), encoding="utf-8")
    return learned, held


def _tell(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty() or done == total:
        print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)


def measure(
    work: Path, scale: Scale, settings: FitSettings, budgets: Sequence[float], finetunes: bool = False
) -> None:
    """All cells that the rows do not have: what fit does at every budget first."""
    known = {(row["model"], row["budget"], row["way"]) for row in read_rows(work)}
    bench = Bench(work, scale, settings, finetunes)

    def keep(budget: float, way: str, row: dict[str, Any]) -> None:
        append_row(work, {"model": scale.model, "budget": budget, "way": way, **row})
        known.add((scale.model, budget, way))
        print(scale.model, budget, way, {k: v for k, v in row.items() if k != "options"}, flush=True)

    if (scale.model, 1.0, "predictor") not in known:
        check = bench.fitter.check
        row = {k: v for k, v in asdict(check).items() if v == v}
        keep(1.0, "predictor", row | {"scale": asdict(scale), "settings": asdict(settings)})
    if (scale.model, 1.0, "as it is") not in known:
        row = bench.evaluate("model", f"{4 * scale.context}", "full")
        keep(1.0, "as it is", row | {"fits": True, "bytes": bench.dense_nbytes})
    for first in (True, False):
        for budget in budgets:
            memory = int(budget * bench.dense_nbytes)
            for way in bench.ways(memory):
                name = way if isinstance(way, str) else way.name
                if (name == FIT) == first and (scale.model, budget, name) not in known:
                    try:
                        keep(budget, name, bench.spend(way, memory))
                    except modicum.InputError as error:
                        keep(budget, name, {"fits": False, "why": str(error)})


def section(raw: dict[str, Any]) -> str:
    """The tables, markers left out."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in raw["rows"]):
        rows = {(r["budget"], r["way"]): r for r in raw["rows"] if r["model"] == model}
        parts.append(_model(model, rows, raw))
    return "\n\n".join(parts)


def _model(model: str, rows: dict[tuple[float, str], dict[str, Any]], raw: dict[str, Any]) -> str:
    whole, check = rows[1.0, "as it is"], rows[1.0, "predictor"]
    scale = check["scale"]
    lines = [["as it is", "100%", format_size(whole["bytes"]), *_scores(whole), ""]]
    for (budget, way), row in sorted(rows.items(), key=_place):
        if budget == 1.0:
            continue
        name = f"**{way}**" if way in (FIT, FINETUNED) else way
        if not row["fits"]:
            lines.append([name, f"{budget:.0%}", "does not fit", "", "", ""])
            continue
        form = "16 bits" if row["store"] == "model" else row["store"]
        cache = f"{row['tokens']:,} slots in {form}"
        lines.append([name, f"{budget:.0%}", format_size(row["bytes"]), *_scores(row), cache])
    tau = f"{check['fitted_tau']:.2f}" if "fitted_tau" in check else "–"
    bytes_tau = f"; bytes alone {check['bytes_tau']:.2f}" if "bytes_tau" in check else ""
    batch = f", {scale['batch']} sequences" if scale.get("batch", 1) > 1 else ""
    lead = (
        f"`{model}`, measured {raw['date']} on one thread ({processors(rows.values())}), in bfloat16, a "
        f"context of {scale['context']:,} tokens{batch}: {whole['questions']} questions (hidden), perplexity "
        f"of {scale['stretches']} stretches of held-back text; one seed. Kendall's τ of the predictor over "
        f"{check['samples']} assembled models: plain sum {check['plain_tau']:.2f}, fitted {tau} (left out); "
        f"{'fitted' if check['is_fitted'] else 'plain sum'} used{bytes_tau}. Weights may be "
        f"{', '.join(check['settings']['weights'])}."
    )
    return lead + "\n\n" + report.table(["", "memory", "bytes", "perplexity", "recall", "cache"], lines)


def _place(item: tuple[tuple[float, str], Any]) -> tuple[float, bool, bool]:
    """Of a row in its table: large budgets first, what fit does before the rest."""
    (budget, way), _ = item
    return -budget, way != FIT, way != FINETUNED


def _scores(row: dict[str, Any]) -> list[str]:
    return [f"{row['perplexity']:.1f}", f"{row['recall']:.0%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="rows.jsonl and libraries")
    parser.add_argument("--model", default="reference")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=Scale.batch, help="sequences whose caches count")
    parser.add_argument("--probe-length", type=int, default=2048)
    parser.add_argument("--questions", type=int, default=Scale.questions, help="contexts of each task")
    parser.add_argument("--stretches", type=int, default=Scale.stretches, help="of text, for perplexity")
    parser.add_argument("--probes", type=int, default=FitSettings.probes)
    parser.add_argument("--weights", default=",".join(FitSettings.weights))
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--finetune", action="store_true", help="a row after distillation, too")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--docs", action="store_true")
    given = parser.parse_args()
    given.work = work_folder(given.work, given.quick)
    if given.docs:
        write_docs(given.work, section, "benchmarks_fit.json", "fit.md", "fit")
        return
    torch.set_num_threads(1)
    scale = Scale(given.model, given.context, given.batch, given.questions, given.stretches)
    settings = FitSettings(
        weights=tuple(given.weights.split(",")),
        probes=given.probes,
        probe_length=given.probe_length,
        method=given.method,
    )
    budgets = [float(x) for x in given.budgets.split(",")]
    if given.quick:
        scale = replace(scale, context=1024, questions=1, stretches=2)
        settings = replace(
            settings, weights=("dense", "50%"), stores=("model", "int4"), sequences=8, length=256, probes=1,
            probe_length=512, samples=4, candidates=2,
        )  # fmt: skip
        budgets = [0.6]
    with float32_products(torch.bfloat16):
        measure(given.work, scale, settings, budgets, given.finetune)


if __name__ == "__main__":
    main()
