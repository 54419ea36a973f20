"""Finetune: the model as it was, distilled into the fitted one, its masks kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from modicum.distill.entry import DistillSettings, distill
from modicum.distill.model_digest import model_digest
from modicum.distill.training import TrainingSettings
from modicum.fit.haystack_questions import in_haystack
from modicum.fit.settings import FitSettings
from modicum.loading import load
from modicum.tasks.expression import parse_task
from modicum.weights import packed
from modicum.weights.checkpoint import write_model
from modicum.weights.progress import Progress
from modicum.weights.state import State


def finetune(
    model: PreTrainedModel,
    tokenizer: Any,
    masks: dict[str, Tensor],
    teacher: str,
    texts: Sequence[str],
    work: Path,
    settings: FitSettings,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Distil a teacher into a pruned model by way of `modicum.distill`; a run that was stopped goes on.

    Args:
        model: with its pruned weights unpacked.
        masks: by the parameters' names; they stay exactly what they are.
        teacher: as `modicum.load` takes it.
        work: a folder for what is written on the way. What it holds of an earlier run is used only if that
            run had the same weights, masks, teacher, texts and settings.

    Returns:
        The finetuned model, its weights unpacked, in the dtype that it had.

    Raises:
        InputError: the folder holds the state of another run, or cannot be written.
    """
    folder = work / "distillation"
    State(folder, _about(model, masks, teacher, texts, settings))
    before, after = folder / "fitted", folder / "finetuned"
    if not (after / packed.FILE).is_file():
        if not (before / packed.FILE).is_file():
            shutil.rmtree(before, ignore_errors=True)
            before.mkdir(parents=True)
            write_model(before, model, tokenizer, "packed", masks, {"method": "fit"})
        tasks = _tasks(settings, texts, folder / "learned.txt") if settings.task_share else ""
        how = DistillSettings(
            length=min(settings.length, 512),
            tasks=tasks,
            task_share=settings.task_share or 0.5,
            seed=settings.seed,
            device=str(model.device),
            training=TrainingSettings(batch=4, seed=settings.seed),
        )
        distill(before, [teacher], texts, after, how, progress=progress)
    found, _ = load(after, dtype=model.dtype, device=model.device, weights="dense")
    return found


def _tasks(settings: FitSettings, texts: Sequence[str], haystack: Path) -> str:
    """The tasks of the settings with one question a text and their needles in the texts, which are written
    to a file.
    """
    if not settings.tasks:
        return ""
    haystack.write_text("\n\n".join(texts), encoding="utf-8")
    tasks = [in_haystack(task, haystack) for task in parse_task(settings.tasks)]
    return ",".join(
        replace(task, each=False).name if getattr(task, "each", False) else task.name for task in tasks
    )


def _about(
    model: PreTrainedModel,
    masks: Mapping[str, Tensor],
    teacher: str,
    texts: Sequence[str],
    settings: FitSettings,
) -> dict[str, Any]:
    """What a distillation depends on."""
    return {
        "method": "fit",
        "weights": model_digest(model, masks),
        "teacher": teacher,
        "texts": sha256(json.dumps(list(texts)).encode()).hexdigest(),
        "settings": [settings.length, settings.tasks, settings.task_share, settings.seed],
    }
