"""Entry: a model, a memory and some text in; a folder out that runs within that memory."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from modicum.fit.fit_report import FitReport
from modicum.fit.fitter import Fitter
from modicum.fit.folder import save_fitted
from modicum.fit.settings import FitSettings, Target
from modicum.float32_products import float32_products
from modicum.weights.new_folder import STATE, check_new
from modicum.weights.progress import Progress


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
            it would lose); the library is of another reference; `out` holds the distillation of another
            plan, teacher, text or settings.
        ModelError: the model cannot be pruned or its cache budgeted, no candidate's loss is a number, or a
            file cannot be written.
    """
    started = time.perf_counter()
    check_new(Path(out))
    where = None if text is None else Path(text)
    kept = None if library is None else Path(library)
    with float32_products(model.dtype):
        fitter = Fitter(model, tokenizer, where, target, settings, library=kept, progress=progress)
        fitter.check_reachable()
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
