"""Fitter: a reference with its library: plans for any memory, and models made of them."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from modicum.cache_folder import cache_folder
from modicum.distill.sequences import digest
from modicum.errors import InputError, ModelError
from modicum.evaluation.fingerprint import fingerprint
from modicum.evaluation.runner import max_positions
from modicum.fit import assembly
from modicum.fit.cache_option import CacheErrors, CacheOption, CacheSizes
from modicum.fit.finetune import finetune
from modicum.fit.fit_plan import FitPlan, Planner, too_small
from modicum.fit.fit_report import FitReport, Measured
from modicum.fit.fit_text import FitText
from modicum.fit.heads_digest import heads_digest
from modicum.fit.least import least_plan
from modicum.fit.library import Library
from modicum.fit.loss import Check, Loss, Sums, fit_loss
from modicum.fit.part import model_nbytes
from modicum.fit.probe import Errors, MakeCache, probe_length
from modicum.fit.samples import sample_plans
from modicum.fit.settings import FitSettings, Target
from modicum.kv.budget import Budget
from modicum.kv.cache import BudgetCache
from modicum.kv.calibration import calibrate
from modicum.kv.fingerprint import weights_digest
from modicum.kv.head_profile import HeadProfile
from modicum.kv.head_store import find_profile, use_profile
from modicum.kv.policies.calibrated import Calibrated
from modicum.kv.registry import parse_policy
from modicum.search.predictor import kendall_tau
from modicum.weights.blocks import one_by_one
from modicum.weights.plain_model import plain_model
from modicum.weights.progress import Progress


class Fitter:
    """A reference with its library: plans for any memory.

    Args:
        model: the reference, its weights dense and in memory. `apply` changes it, nothing else does.
        text: a file, or a folder of .txt files; None for the sample text. A quarter is held
            back for probes, the text of their questions included.
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
        most = max_positions(self.model)
        if most is not None and target.context > most:
            warnings.warn(
                f"the context of {target.context:,} tokens is beyond the {most:,} positions that the model "
                f"was made for: its cache fits, but answers may fail there; context={most} would do",
                stacklevel=2,
            )
        short = probe_length(self.model, self.settings.length, self.length)
        self.text = FitText.read(text, tokenizer, short, self.length)
        asks = self.settings.tasks if self.settings.task_share else ""
        how_much = (self.model, tokenizer, asks, self.settings)
        calibrating = self.text.sequences(*how_much, short, self.tell)
        self.short = self.text.probes(*how_much, short, self.tell)
        self.probes = self.text.probes(*how_much, self.length, self.tell)
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
        self.sizes = CacheSizes(self.model, self.settings.policy, self.length, self.probes.read)
        heads = heads_digest(self.model, self.sizes.policy)
        self.library = Library(folder, self.model, calibrating, self.settings, about, heads)
        self.loss = Loss(self.settings.task_share if asks else 0.0)
        self.check = Check(0, math.nan, math.nan, False)
        self.left_out: list[str] = []

    def check_reachable(self) -> None:
        """Raise if no plan fits the target, before anything else is measured.

        Raises:
            InputError: none does; names the least that can be, and the loss that it has.
        """
        target = self.target
        least = least_plan(self.library, self._fixed_nbytes, self.sizes, self.settings.stores, target)
        if least.nbytes(target.batch) <= target.nbytes:
            return
        kept = {m.name: m.weight.clone() for part in self.library.parts for m in part.matrices}
        try:
            with self._quiet():
                assembly.in_order(self.library, least.options, self.tell)
                errors = self.measure_model(self.model, least.cache)
        finally:
            for part in self.library.parts:
                for matrix in part.matrices:
                    matrix.weight.data.copy_(kept[matrix.name])
        loss = f"a loss of {errors.loss(self.loss.task_share):.3g}"
        raise too_small(target, least, loss, self.sizes)

    @property
    def _fixed_nbytes(self) -> int:
        """Of what is not chosen: embeddings, output layer, norms, buffers."""
        chosen = sum(matrix.weight.nbytes for part in self.library.parts for matrix in part.matrices)
        return model_nbytes(self.model) - chosen

    def build(self) -> None:
        """Measure all variants, caches and samples that the library does not have."""
        with self._quiet():
            self.library.build(self.short, self.tell)
            caches = self._caches()
            self.left_out += self.library.left_out
            if self.left_out:
                warnings.warn(
                    f"left out, as their errors are not numbers: {', '.join(self.left_out)}", stacklevel=2
                )
            stores = list(dict.fromkeys(option.store for option in caches))
            errors = CacheErrors(caches)
            self.planner = Planner(self.library, self._fixed_nbytes, self.sizes, errors, stores)
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
        """Plans within a memory, assembled and measured, the least loss first, losses that are not numbers
        last.

        Raises:
            InputError: nothing fits; names the least that can be, and what it would lose.
            ModelError: no candidate's loss is a number.
        """
        target = Target(memory, self.target.context, self.target.batch)
        plans = self.candidates(target)
        found = []
        for number, plan in enumerate(plans):
            self.tell("measuring candidates", number, len(plans))
            errors = self.measure(plan)
            found.append(Measured(plan, errors, errors.loss(self.loss.task_share)))
        self.tell("measuring candidates", len(plans), len(plans))
        found.sort(key=lambda m: (math.isnan(m.loss), m.loss))
        if not math.isfinite(found[0].loss):
            raise ModelError(
                f"none of the {len(found)} candidates has a loss that is a number: give a larger memory, "
                "other weights or stores, or load the model in float32"
            )
        return found

    def candidates(self, target: Target) -> list[FitPlan]:
        """The optimum, the optimum for each form of slots and by the plain sum, and the best uniform plans;
        of each what is left of the memory goes to the cache. The optimum is the first; of equal plans the
        first stands.
        """
        best = self.planner.best(target, self.loss)
        plans = [best]
        by_store = []
        for store in self.planner.stores:
            try:
                caches = self.sizes.grid([store], target.context)
                by_store.append(self.planner.best(target, self.loss, caches=caches, how=f"optimum, {store}"))
            except InputError:
                continue
        plain = self.planner.best(target, Loss(self.loss.task_share), how="optimum, plain sum")
        tried = [
            self.planner.uniform(target, self.loss, option.name, store)
            for option in self.library.options
            for store in self.planner.stores
        ]
        uniform = sorted((p for p in tried if p is not None), key=lambda p: p.predicted)[:2]
        plans += [plain, *uniform[:1], *sorted(by_store, key=lambda p: p.predicted), *uniform[1:]]
        filled = [self.planner.filled(plan, target, self.loss) for plan in plans]
        different: dict[str, FitPlan] = {}
        for plan in filled:
            different.setdefault(plan.name, plan)
        return list(different.values())[: self.settings.candidates]

    def apply(self, chosen: Measured, candidates: Sequence[Measured] = ()) -> FitReport:
        """Put a plan into the model, for good: the library's weights, or those of pruning in order, whichever
        lose less; and calibrate its heads anew, or keep the reference's head profile, likewise.
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
            # Not "larger": a loss that is not a number is none to keep either.
            if masks and self.profile is not None and not errors.loss(share) <= chosen.loss:
                # The reference's profile, with which the candidate was measured, divides the slots better.
                profile, errors = replace(self.profile, weights=weights_digest(self.model)), chosen.errors
                use_profile(self.model, profile)
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
            left_out=self.left_out,
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
            [self.tokenizer.decode(self.text.learned)],
            work,
            self.settings,
            self.tell,
        )
        profile = self._calibrate(trained)
        errors = self.measure_model(trained, report.plan.cache)
        report.before_finetuning = report.loss
        report.after_finetuning = errors.loss(self.loss.task_share)
        if not report.after_finetuning < report.loss:  # as where it is not a number
            return self.model
        report.errors, report.loss, report.profile = errors, report.after_finetuning, profile
        return trained

    def _caches(self) -> dict[CacheOption, Errors]:
        """Errors of caches alone. Forms of slots whose errors are not numbers are left out and named."""
        known = self.library.rows("cache")
        found = {}
        options = self.sizes.measured(self.settings.stores)
        for number, option in enumerate(options):
            self.tell("measuring caches", number, len(options))
            if option.name not in known:
                known[option.name] = self.measure_model(self.model, option)
                self.library.keep("cache", option.name, known[option.name])
            found[option] = known[option.name]
        self.tell("measuring caches", len(options), len(options))
        wrong = {option.store: option for option, errors in found.items() if not errors.is_finite}
        self.left_out = [f"slots in {store} ({option.tokens:,} of them)" for store, option in wrong.items()]
        if len(wrong) == len(self.settings.stores):
            raise ModelError(
                f"a cache in {', '.join(wrong)} gives values that are not numbers: load the model in "
                "float32, or give other stores"
            )
        return {option: errors for option, errors in found.items() if option.store not in wrong}

    def _make_cache(self, model: PreTrainedModel, option: CacheOption) -> MakeCache:
        def make(length: int) -> BudgetCache:
            own = option.at(length)
            budget = Budget(tokens=max(own.tokens, self.sizes.least))
            return BudgetCache(model, self.sizes.policy, budget, store=own.store, length=length)

        return make

    def _samples(self) -> None:
        """Assemble and measure models of many sizes, and fit the loss to them."""
        num = self.settings.samples
        plans = sample_plans(self.planner, self.target, self.loss, num, self.settings.seed)
        measured = []
        for number, plan in enumerate(plans):
            self.tell("measuring assembled models", number, num)
            measured.append(self.measure(plan))
        self.tell("measuring assembled models", num, num)
        share = self.loss.task_share
        self.loss, check = fit_loss([self.sums(p) for p in plans], measured, share)
        finite = [(p, errors) for p, errors in zip(plans, measured, strict=True) if errors.is_finite]
        smaller = [-float(plan.nbytes(self.target.batch)) for plan, _ in finite]
        self.check = replace(
            check, bytes_tau=kendall_tau(smaller, [errors.loss(share) for _, errors in finite])
        )

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


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]
