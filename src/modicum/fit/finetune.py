"""Finetune: the model as it was, distilled into the fitted one, its masks kept."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from modicum.distill.entry import DistillSettings, distill
from modicum.distill.training import TrainingSettings
from modicum.fit.settings import FitSettings
from modicum.loading import load
from modicum.weights import packed
from modicum.weights.checkpoint import write_model
from modicum.weights.progress import Progress


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
        work: a folder for what is written on the way.

    Returns:
        The finetuned model, its weights unpacked, in the dtype that it had.
    """
    before, after = work / "fitted", work / "finetuned"
    if not (after / packed.FILE).is_file():
        if not (before / packed.FILE).is_file():
            shutil.rmtree(before, ignore_errors=True)
            before.mkdir(parents=True)
            write_model(before, model, tokenizer, "packed", masks, {"method": "fit"})
        tasks = settings.tasks.replace(",each=true", "") if settings.task_share else ""
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
