"""Finetuning: a distillation goes on only where it is of the same plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modicum.errors import InputError
from modicum.fit import finetune as module
from modicum.fit.finetune import finetune
from modicum.fit.settings import FitSettings
from modicum.tasks.expression import parse_task
from modicum.weights import packed
from modicum.weights.checkpoint import write_model
from tests.fit.fitting import QUICK, tiny

NAME = "model.layers.0.mlp.up_proj.weight"


class Distillation:
    """Stands in for the training: the student as it is, written to where the outcome belongs."""

    def __init__(self) -> None:
        self.settings: list[Any] = []
        self.masks: dict[str, torch.Tensor] = {}
        self.model: Any = None

    def __call__(self, student: Path, teachers: Any, texts: Any, out: Path, how: Any, **_: Any) -> Any:
        self.settings.append(how)
        assert (student / packed.FILE).is_file()
        _, tokenizer = tiny()
        out.mkdir(parents=True)
        write_model(out, self.model, tokenizer, "packed", self.masks, {"method": "fit"})
        return SimpleNamespace()


def masked(seed: int) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """A tiny model with one weight pruned at random."""
    model, tokenizer = tiny()
    weight = model.get_parameter(NAME)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    with torch.no_grad():
        weight.mul_(mask)
    return model, tokenizer, {NAME: mask}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    distillation = Distillation()
    monkeypatch.setattr(module, "distill", distillation)

    def call(
        seed: int = 0, teacher: str = "teacher", text: str = "A text.", settings: FitSettings = QUICK
    ) -> Any:
        model, tokenizer, masks = masked(seed)
        distillation.model, distillation.masks = model, masks
        return finetune(model, tokenizer, masks, teacher, [text], tmp_path / "state", settings)

    return SimpleNamespace(call=call, distillation=distillation, folder=tmp_path / "state")


def test_the_same_run_goes_on_and_another_is_refused(run: Any) -> None:
    found = run.call()
    assert torch.equal(run.call().get_parameter(NAME), found.get_parameter(NAME))
    assert len(run.distillation.settings) == 1
    run.call(settings=replace(QUICK, candidates=9))  # which plan is taken, and how, is in the weights
    assert len(run.distillation.settings) == 1
    for other in (
        {"seed": 1},
        {"teacher": "another"},
        {"text": "Another text."},
        {"settings": replace(QUICK, seed=3)},
    ):
        with pytest.raises(InputError, match="other settings, text or model"):
            run.call(**other)
    assert len(run.distillation.settings) == 1


def test_weights_that_lie_there_without_a_word_of_what_they_are_of_are_not_taken(run: Any) -> None:
    model, tokenizer, masks = masked(1)
    for name in ("fitted", "finetuned"):
        (run.folder / name).mkdir(parents=True)
        write_model(run.folder / name, model, tokenizer, "packed", masks, {"method": "fit"})
    found = run.call(seed=0).get_parameter(NAME)
    assert not bool(found[~masked(0)[2][NAME]].count_nonzero())


def test_questions_of_the_distillation_stand_in_the_text_one_for_each(run: Any) -> None:
    tasks = "niah_single_2:max_new_tokens=8,niah_multikey_1:keys=4,each=true"
    run.call(text="Whales sing at night. " * 9, settings=replace(QUICK, tasks=tasks))
    _, tokenizer = tiny()
    for task in parse_task(run.distillation.settings[0].tasks):
        made: Any = task
        assert not made.each
        assert "Whales sing at night." in task.sample(0, 512, tokenizer, 1).context
