"""The fitter: its candidates, and losses that are not numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modicum.errors import ModelError
from modicum.fit import fitter as module
from modicum.fit.fit_plan import FitPlan
from modicum.fit.fitter import Fitter
from modicum.fit.loss import Loss
from modicum.fit.page import write_fit_page
from modicum.fit.probe import Errors
from modicum.fit.samples import sample_plans
from modicum.fit.settings import Target
from modicum.kv.fingerprint import weights_digest
from modicum.kv.head_profile import HeadProfile
from modicum.kv.head_store import use_profile
from tests.fit.fitting import CONTEXT, QUICK, fitter, tiny

pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Fitter:
    settings = replace(QUICK, weights=("dense", "50%"), samples=0, probes=1)
    found = fitter(tmp_path_factory.mktemp("fitter"), settings)
    found.build()
    return found


@pytest.mark.parametrize("share", [0.65, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("number", [1, 2, 6])
def test_the_optimum_is_the_first_candidate(
    made: Fitter, share: float, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target(int(share * made.planner.dense_nbytes(made.target)), CONTEXT)
    monkeypatch.setattr(made, "settings", replace(made.settings, candidates=number))
    plans = made.candidates(target)
    best = made.planner.filled(made.planner.best(target, made.loss), target, made.loss)
    assert plans[0] == best
    assert len({plan.name for plan in plans}) == len(plans) <= number


def test_a_loss_that_is_not_a_number_is_never_the_best(made: Fitter, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = int(0.75 * made.planner.dense_nbytes(made.target))
    losses = iter([math.nan, 0.5, 0.25])

    def measure(_: FitPlan) -> Errors:
        loss = next(losses, math.nan)
        return Errors(loss, loss, 0.0)

    monkeypatch.setattr(made, "settings", replace(made.settings, candidates=3))
    monkeypatch.setattr(made, "measure", measure)
    found = made.plan(memory)
    assert [m.loss for m in found][:2] == [0.25, 0.5]
    assert math.isnan(found[2].loss)
    with pytest.raises(ModelError, match="none of the 3 candidates"):
        made.plan(memory)


def test_a_form_of_slots_that_gives_no_numbers_is_left_out(tmp_path: Path) -> None:
    settings = replace(QUICK, weights=("dense",), samples=0, probes=1)
    own: Any = fitter(tmp_path, settings)
    measure = own.measure_model
    wrong = {"int8"}

    def broken(model: Any, cache: Any) -> Errors:
        found: Errors = measure(model, cache)
        return Errors(math.nan, math.nan, 0.0) if cache.store in wrong else found

    own.measure_model = broken
    with pytest.warns(UserWarning, match=r"left out, .*: slots in int8"):
        own.build()
    assert own.planner.stores == ("model",)
    assert own.left_out == [f"slots in int8 ({own.sizes.measured(('int8',))[-1].tokens} of them)"]
    target = Target(2 * own.planner.dense_nbytes(own.target), CONTEXT)
    assert {plan.cache.store for plan in own.candidates(target)} == {"model"}
    wrong.add("model")
    (tmp_path / "cache.jsonl").unlink()
    with pytest.raises(ModelError, match="cache in model, int8 gives values that are not numbers"):
        own.build()


def test_the_predictor_is_compared_with_bytes_alone(tmp_path: Path) -> None:
    own = fitter(tmp_path)
    own.build()
    plans = sample_plans(own.planner, own.target, Loss(own.loss.task_share), QUICK.samples, QUICK.seed)
    pairs = [(plan.nbytes(1), own.measure(plan).loss(own.loss.task_share)) for plan in plans]
    signs = [
        math.copysign(1, (a[0] - b[0]) * (b[1] - a[1]))
        for i, a in enumerate(pairs)
        for b in pairs[:i]
        if a[0] != b[0] and a[1] != b[1]
    ]
    assert len(signs) == 10  # no ties, so that τ is a mean over pairs
    assert own.check.bytes_tau == pytest.approx(sum(signs) / 10)


def test_all_parts_that_give_no_numbers_are_named_in_every_run_and_on_the_page(tmp_path: Path) -> None:
    settings = replace(QUICK, weights=("dense", "50%", "2:4"), stores=("model",), samples=0, probes=1)
    named = ["0.mlp at 50%", "0.mlp at 2:4", "3.attention at 50%"]
    wrong = {tuple(name.split(" at ")) for name in named}
    for run in range(2):
        own = fitter(tmp_path / "library", settings)
        if run == 0:
            at = iter([(p.name, o.name) for p in own.library.parts for o in own.library.options[1:]])
            measure = own.short.measure

            def broken(model: Any, *more: Any, at: Any = at, measure: Any = measure) -> Errors:
                return Errors(math.nan, 0.0, 1.0) if next(at) in wrong else measure(model, *more)

            own.short.measure = broken  # type: ignore[method-assign]
        with pytest.warns(UserWarning, match="left out") as told:
            own.build()
        assert sum(str(one.message).endswith(f": {', '.join(named)}") for one in told) == 1
        assert not wrong & set(own.library.variants)
    report = own.apply(own.plan(own.planner.dense_nbytes(own.target) * 3 // 4)[0])
    assert report.to_dict()["left_out"] == named
    assert not wrong & set(report.plan.options.items())
    page = write_fit_page(report, "tiny", tmp_path).read_text(encoding="utf-8")
    assert all(name in page for name in named)


def test_errors_that_were_measured_with_another_head_profile_are_not_taken(tmp_path: Path) -> None:
    model, _ = tiny()
    settings = replace(QUICK, policy="calibrated+keydiff", probes=1)
    heads = []
    for seed in (0, 1, 0):
        tables = torch.rand(1, 5, 4, generator=torch.Generator().manual_seed(seed)).tolist()
        use_profile(model, HeadProfile((0.5,), tables, weights=weights_digest(model)))
        library = fitter(tmp_path, settings, model).library
        heads.append(library.heads)
        assert ("x" in library.rows("cache")) == (len(heads) == 3)
        if len(heads) == 1:
            library.keep("cache", "x", Errors(0.1, 0.1, 1.0))
    assert heads[0] == heads[2] != heads[1]


def test_a_finetuned_model_whose_loss_is_not_a_number_is_not_taken(
    made: Fitter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, _ = tiny()
    report: Any = SimpleNamespace(masks={}, plan=SimpleNamespace(cache=None), loss=0.5)
    monkeypatch.setattr(module, "finetune", lambda *_: trained)
    monkeypatch.setattr(made, "measure_model", lambda *_: Errors(math.nan, math.nan, 0.0))
    assert made.finetuned(report, "teacher", tmp_path) is made.model
    assert report.loss == 0.5
