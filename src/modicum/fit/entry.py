"""Entry: a model, a memory and some text in; a folder out that runs within that memory."""

from __future__ import annotations

import math
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modicum.cache_folder import cache_folder
from modicum.distill.sequences import Questions, digest, with_questions
from modicum.errors import InputError, ModelError
from modicum.evaluation.fingerprint import fingerprint
from modicum.fit import assembly
from modicum.fit.cache_option import CacheErrors, CacheOption, CacheSizes
from modicum.fit.finetune import finetune
from modicum.fit.fit_plan import FitPlan, Planner
from modicum.fit.folder import save_fitted
from modicum.fit.library import Library
from modicum.fit.loss import Check, Loss, Sums, fit_loss
from modicum.fit.part import model_nbytes
from modicum.fit.probe import Errors, MakeCache, Probes, probe_length, windows
from modicum.fit.settings import FitSettings, Target
from modicum.kv.budget import Budget
from modicum.kv.cache import BudgetCache
from modicum.kv.cache_settings import CacheSettings
from modicum.kv.calibration import calibrate
from modicum.kv.head_profile import HeadProfile
from modicum.kv.head_store import find_profile, use_profile
from modicum.kv.policies.calibrated import Calibrated
from modicum.kv.registry import parse_policy
from modicum.texts import sample_text
from modicum.weights.blocks import one_by_one
from modicum.weights.calibration import texts_in
from modicum.weights.new_folder import STATE, check_new
from modicum.weights.plain_model import plain_model
from modicum.weights.progress import Progress

_HELD_BACK = 4
"""One part of so many of the text is for probes; what is pruned on is the rest."""


@dataclass
class Measured:
    """A plan, assembled and measured."""

    plan: FitPlan
    errors: Errors
    loss: float


@dataclass
class FitReport:
    """What was done.

    Attributes:
        plan: that was taken.
        errors: of the model that was written, on the probes.
        loss: of them.
        dense_nbytes: of the model as it was, with transformers' whole cache.
        check: of the predictor.
        candidates: plans that were assembled and measured, the best first.
        in_order: whether the weights are those of pruning in order, not the library's.
        variants: each part's errors and bytes at its options.
    """

    target: Target
    settings: FitSettings
    plan: FitPlan
    errors: Errors
    loss: float
    dense_nbytes: int
    weights_nbytes: int
    cache_nbytes: int
    check: Check
    candidates: list[Measured]
    in_order: bool
    variants: list[dict[str, Any]]
    probe_length: int
    library: str
    seconds: float = 0.0
    file_bytes: int = 0
    before_finetuning: float | None = None
    after_finetuning: float | None = None
    masks: dict[str, Tensor] = field(default_factory=dict, repr=False)
    profile: HeadProfile | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        """Of weights and caches, as a run holds them."""
        return self.weights_nbytes + self.target.batch * self.cache_nbytes

    @property
    def cache(self) -> CacheSettings:
        """Of a run."""
        return CacheSettings(self.settings.policy, f"{self.cache_nbytes} B", self.plan.cache.store)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "memory": self.target.nbytes,
            "context": self.target.context,
            "batch": self.target.batch,
            "settings": asdict(self.settings),
            "plan": self.plan.to_dict(),
            "errors": self.errors.to_dict(),
            "loss": self.loss,
            "bytes": self.nbytes,
            "dense_bytes": self.dense_nbytes,
            "weights_bytes": self.weights_nbytes,
            "cache_bytes": self.cache_nbytes,
            "file_bytes": self.file_bytes,
            "predictor": {k: v for k, v in asdict(self.check).items() if v == v},
            "candidates": [
                {**m.plan.to_dict(), "loss": m.loss, "errors": m.errors.to_dict()} for m in self.candidates
            ],
            "pruned_in_order": self.in_order,
            "variants": self.variants,
            "probe_length": self.probe_length,
            "library": self.library,
            "seconds": self.seconds,
            "loss_before_finetuning": self.before_finetuning,
            "loss_after_finetuning": self.after_finetuning,
        }


class Fitter:
    """A reference with its library: plans for any memory.

    Args:
        model: the reference, its weights dense and in memory. `apply` changes it, nothing else does.
        text: a file, or a folder of .txt files; None for the sample text. A quarter is held back for probes.
        target: its context and batch; the memory may differ in `plan`.
        library: folder; None for one in the user's cache folder, by what it is made of.
        progress: called with what is done, how much of it, and of how much.

    Raises:
        InputError: a setting or the text cannot be used, or the library is another's.
        ModelError: the model cannot be pruned, or its cache cannot be budgeted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        text: Path | None,
        target: Target,
        settings: FitSettings | None = None,
        *,
        library: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.tokenizer = plain_model(model), tokenizer
        self.target, self.settings = target, settings or FitSettings()
        self.tell = progress or (lambda *_: None)
        self.model.train(False)
        self.profile = self._calibrate(self.model)
        self.length = probe_length(self.model, self.settings.probe_length, target.context)
        self._read_text(text)
        asks = self.settings.tasks if self.settings.task_share else ""
        calibrating = self._calibrating(asks)
        self.short, self.probes = self._probes(text, asks)
        mark = fingerprint(self.model, tokenizer)
        how = asdict(self.settings)
        for name in ("samples", "candidates", "stores"):  # what there is may be more or less of these
            how.pop(name)
        about = {
            "reference": mark,
            "dtype": str(self.model.dtype),
            "text": "".join((digest(calibrating), self.short.digest, self.probes.digest)),
            **how,
        }
        folder = library or cache_folder() / "fit" / _digest(about)
        self.library = Library(folder, self.model, calibrating, self.settings, about)
        self.sizes = CacheSizes(self.model, self.settings.policy)
        self.loss = Loss(self.settings.task_share if asks else 0.0)
        self.check = Check(0, math.nan, math.nan, False)

    def build(self) -> None:
        """Measure all variants, caches and samples that the library does not have."""
        with self._quiet():
            self.library.build(self.short, self.tell)
            self.planner = Planner(
                self.library,
                model_nbytes(self.model)
                - sum(m.weight.nbytes for part in self.library.parts for m in part.matrices),
                self.sizes,
                CacheErrors(self._caches()),
                self.settings.stores,
            )
            self._samples()

    def measure(self, plan: FitPlan) -> Errors:
        """The errors of a plan, assembled from the library; kept there."""
        known = self.library.rows("samples")
        if plan.name not in known:
            with self._quiet(), self.library.assembled(plan.options) as model:
                known[plan.name] = self.measure_model(model, plan.cache)
            self.library.keep("samples", plan.name, known[plan.name])
        return known[plan.name]

    def measure_model(self, model: PreTrainedModel, cache: CacheOption) -> Errors:
        """The errors of a model with a cache of the same share of the probes. A model without a head profile
        borrows the reference's.
        """
        if self.profile is not None and find_profile(model) is None:
            use_profile(model, replace(self.profile, weights=""))
        with torch.no_grad():
            return self.probes.measure(model, self._make_cache(model, cache))

    def plan(self, memory: int | str) -> list[Measured]:
        """Plans within a memory, assembled and measured, the least loss first.

        Raises:
            InputError: nothing fits; names the least that can be, and what it would lose.
        """
        target = Target(memory, self.target.context, self.target.batch)
        plans = self.candidates(target)
        found = []
        for number, plan in enumerate(plans):
            self.tell("measuring candidates", number, len(plans))
            errors = self.measure(plan)
            found.append(Measured(plan, errors, errors.loss(self.loss.task_share)))
        self.tell("measuring candidates", len(plans), len(plans))
        return sorted(found, key=lambda m: m.loss)

    def candidates(self, target: Target) -> list[FitPlan]:
        """The optimum, the optimum for each form of slots and by the plain sum, and the best uniform plans;
        of each what is left of the memory goes to the cache.
        """
        best = self.planner.best(target, self.loss)
        plans = [best]
        by_store = []
        for store in self.settings.stores:
            try:
                caches = self.sizes.grid([store], target.context)
                by_store.append(self.planner.best(target, self.loss, caches=caches, how=f"optimum, {store}"))
            except InputError:
                continue
        plain = self.planner.best(target, Loss(self.loss.task_share), how="optimum, plain sum")
        tried = [
            self.planner.uniform(target, self.loss, option.name, store)
            for option in self.library.options
            for store in self.settings.stores
        ]
        uniform = sorted((p for p in tried if p is not None), key=lambda p: p.predicted)[:2]
        plans += [plain, *uniform[:1], *sorted(by_store, key=lambda p: p.predicted), *uniform[1:]]
        filled = [self.planner.filled(plan, target, self.loss) for plan in plans]
        return list({plan.name: plan for plan in reversed(filled)}.values())[::-1][: self.settings.candidates]

    def apply(self, chosen: Measured, candidates: Sequence[Measured] = ()) -> FitReport:
        """Put a plan into the model, for good: the library's weights, or those of pruning in order, whichever
        lose less; and calibrate its heads anew.
        """
        plan = chosen.plan
        with self._quiet():
            share, errors, in_order, profile = self.loss.task_share, chosen.errors, False, self.profile
            masks = assembly.in_order(self.library, plan.options, self.tell)
            if masks:
                profile = self._calibrate(self.model)
                errors = self.measure_model(self.model, plan.cache)
                in_order = errors.loss(share) < chosen.loss
            if masks and not in_order:
                masks = assembly.from_library(self.library, plan.options)
                profile = self._calibrate(self.model)
                errors = self.measure_model(self.model, plan.cache)
        target = self.target
        return FitReport(
            target=target,
            settings=self.settings,
            plan=plan,
            errors=errors,
            loss=errors.loss(share),
            dense_nbytes=self.planner.dense_nbytes(target),
            weights_nbytes=plan.weights_nbytes,
            cache_nbytes=plan.cache_nbytes,
            check=self.check,
            candidates=list(candidates),
            in_order=in_order,
            variants=[
                {"part": v.part, "option": v.option, "bytes": v.nbytes, **v.errors.to_dict()}
                for v in self.library.variants.values()
            ],
            probe_length=self.length,
            library=str(self.library.folder),
            masks=masks,
            profile=profile,
        )

    def finetuned(self, report: FitReport, teacher: str, work: Path) -> PreTrainedModel:
        """The model of a report with a teacher distilled into it; the report then tells of it. The model as
        it was pruned, where that loses less.
        """
        trained = finetune(
            self.model,
            self.tokenizer,
            report.masks,
            teacher,
            [self.tokenizer.decode(self.learned)],
            work,
            self.settings,
            self.tell,
        )
        profile = self._calibrate(trained)
        errors = self.measure_model(trained, report.plan.cache)
        report.before_finetuning = report.loss
        report.after_finetuning = errors.loss(self.loss.task_share)
        if report.after_finetuning >= report.loss:
            return self.model
        report.errors, report.loss, report.profile = errors, report.after_finetuning, profile
        return trained

    def _read_text(self, text: Path | None) -> None:
        """Divide the text into what may be learned from and what errors are measured on."""
        ids: list[int] = []
        for one in [sample_text()] if text is None else texts_in(text):
            ids += self.tokenizer(one, add_special_tokens=False, verbose=False)["input_ids"]
        short = probe_length(self.model, self.settings.length, self.length)
        held = max(len(ids) // _HELD_BACK, self.length)
        if len(ids) - held < short:
            raise InputError(
                f"the text has {len(ids):,} tokens, of which {held:,} are held back to measure errors on, "
                f"and a calibration sequence takes {short:,}: give more text, or a smaller length and "
                "probe_length"
            )
        self.short_length, self.learned, self.held = short, ids[:-held], ids[-held:]

    def _calibrating(self, tasks: str) -> Tensor:
        """Calibration sequences [n, T], some of them questions with the reference's answers."""
        s = self.settings
        num = min(s.sequences, len(self.learned) // self.short_length)
        found = windows(self.learned, num, self.short_length)
        if not tasks or num < 2:
            return found
        told = lambda done, total: self.tell("answering", done, total)  # noqa: E731
        questions = Questions(tasks, s.task_share, s.seed)
        return with_questions(found, self.tokenizer, questions, self._answers, told)

    def _probes(self, text: Path | None, tasks: str) -> tuple[Probes, Probes]:
        """Short ones for single parts, and long ones for caches and whole models."""
        s = self.settings
        made = []
        for length, add in ((self.short_length, 0), (self.length, 1)):
            told = lambda done, total: self.tell("asking the reference", done, total)  # noqa: E731
            ids = windows(self.held, s.probes, length)
            made.append(Probes(self.model, self.tokenizer, ids, tasks, text, 2 * s.seed + add, told))
        return made[0], made[1]

    @torch.no_grad()
    def _answers(self, prompts: Sequence[Sequence[int]], most: int) -> list[list[int]]:
        run: Any = self.model
        answers = []
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=run.device)
            mask = torch.ones_like(ids)
            out = run.generate(ids, attention_mask=mask, max_new_tokens=most, do_sample=False)
            answers.append(out[0, len(prompt) :].tolist())
        return answers

    def _caches(self) -> dict[CacheOption, Errors]:
        known = self.library.rows("cache")
        found = {}
        options = self.sizes.measured(self.settings.stores, self.length)
        for number, option in enumerate(options):
            self.tell("measuring caches", number, len(options))
            if option.name not in known:
                known[option.name] = self.measure_model(self.model, option)
                self.library.keep("cache", option.name, known[option.name])
            found[option] = known[option.name]
        self.tell("measuring caches", len(options), len(options))
        return found

    def _make_cache(self, model: PreTrainedModel, option: CacheOption) -> MakeCache:
        def make(length: int) -> BudgetCache:
            own = option.at(length, min(self.sizes.least, length))
            budget = Budget(tokens=max(own.tokens, self.sizes.least))
            return BudgetCache(model, self.sizes.policy, budget, store=own.store, length=length)

        return make

    def _samples(self) -> None:
        """Assemble and measure models of many sizes, and fit the loss to them."""
        num = self.settings.samples
        plans = self.sample_plans(num)
        measured = []
        for number, plan in enumerate(plans):
            self.tell("measuring assembled models", number, num)
            measured.append(self.measure(plan))
        self.tell("measuring assembled models", num, num)
        self.loss, self.check = fit_loss([self.sums(p) for p in plans], measured, self.loss.task_share)

    def sample_plans(self, num: int) -> list[FitPlan]:
        """Optima of losses that are disturbed at random, for memories from the least to that of the dense
        model: what is predicted later is near an optimum, too.
        """
        draw = random.Random(self.settings.seed)
        target = self.target
        full = self.planner.dense_nbytes(target)
        grid = self.sizes.grid(self.settings.stores, target.context)
        least = self.planner.fixed_nbytes + target.batch * min(map(self.planner.cache_nbytes, grid))
        least += sum(min(v.nbytes for v in self.planner.variants(part.name)) for part in self.library.parts)
        found = []
        for number in range(num):
            share = (number + 0.5) / num
            memory = math.ceil(least * (full / least) ** share)
            scales = {key: math.exp(draw.gauss(0, 1)) for key in self.library.variants}
            scales |= {("cache", store): math.exp(draw.gauss(0, 1)) for store in self.settings.stores}
            found.append(
                self.planner.best(
                    Target(memory, target.context, target.batch), self.loss, scales=scales, how="sample"
                )
            )
        return found

    def sums(self, plan: FitPlan) -> Sums:
        """Of a plan, the sum of block errors by kind."""
        found: Sums = {"cache": self.planner.errors.of(plan.cache)}
        for kind in ("attention", "mlp"):
            some = [
                self.library.variants[part.name, plan.options[part.name]].errors
                for part in self.library.parts
                if part.kind == kind
            ]
            found[kind] = Errors(sum(e.text for e in some), sum(e.answers for e in some), 1.0)
        return found

    def _calibrate(self, model: PreTrainedModel) -> HeadProfile | None:
        """The head profile of the model as it is now, measured if there is none; None for a policy that reads
        none, or where the model cannot be calibrated and the policy names another for such models.
        """
        policy = parse_policy(self.settings.policy)
        if not isinstance(policy, Calibrated):
            return None
        found = find_profile(model)
        if found is None or not found.weights:  # none, or a borrowed one
            try:
                found = calibrate(
                    model,
                    self.tokenizer,
                    progress=lambda done, total: self.tell("calibrating heads", done, total),
                )
            except ModelError:
                if policy.otherwise is None:
                    raise
                return None
            use_profile(model, found)
        return found

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """No gradients, no graphs, and experts one by one, so that their inputs can be heard."""
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            one_by_one(self.model, self.library.blocks),
        ):
            yield


def fit(
    model: PreTrainedModel,
    tokenizer: Any,
    text: str | Path | None,
    out: str | Path,
    target: Target,
    settings: FitSettings | None = None,
    *,
    library: str | Path | None = None,
    teacher: str | None = None,
    progress: Progress | None = None,
) -> FitReport:
    """Choose what weights and cache give up so that both fit a memory, and write the model to a folder.

    `modicum.load(out)` holds the weights packed, and caches are made by what the folder says. The model in
    memory is changed.

    Args:
        model: as `modicum.load(name, weights="dense")` gives it.
        text: a file or a folder of .txt files; None for the sample text.
        out: a new or empty folder.
        library: where variants are kept; None for the user's cache folder.
        teacher: the name of the model as it was, to distil into the fitted one (`modicum.distill`), masks
            kept; None to leave the weights as they are pruned.
        progress: called with what is done, how much of it, and of how much.

    Raises:
        InputError: a setting or the text cannot be used; nothing fits (names the least that can be, and what
            it would lose); the library is of another reference.
        ModelError: the model cannot be pruned or its cache budgeted, or a file cannot be written.
    """
    started = time.perf_counter()
    check_new(Path(out))
    where = None if text is None else Path(text)
    kept = None if library is None else Path(library)
    fitter = Fitter(model, tokenizer, where, target, settings, library=kept, progress=progress)
    fitter.build()
    found = fitter.plan(target.nbytes)
    report = fitter.apply(found[0], found)
    fitted = fitter.model
    if teacher is not None and report.masks:
        fitted = fitter.finetuned(report, teacher, Path(out) / STATE)
    report.seconds = time.perf_counter() - started
    report.file_bytes = save_fitted(
        Path(out),
        fitted,
        tokenizer,
        report.masks,
        report.cache,
        report.profile,
        report.to_dict(),
    )
    shutil.rmtree(Path(out) / STATE, ignore_errors=True)
    return report


def _digest(about: Mapping[str, Any]) -> str:
    import hashlib
    import json

    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]
