"""Folder: a fitted model written so that it runs with no other option."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from modicum.kv.cache_settings import CacheSettings
from modicum.kv.head_profile import HeadProfile
from modicum.run_settings import PROFILE, RunSettings
from modicum.weights.checkpoint import write_model
from modicum.weights.new_folder import new_files

REPORT = "fit.json"


def save_fitted(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    masks: Mapping[str, Tensor],
    cache: CacheSettings,
    profile: HeadProfile | None,
    details: Mapping[str, Any],
) -> int:
    """Write weights (packed), tokenizer, run settings, head profile and fit.json, all or none of them.

    Returns:
        Bytes of the file that holds the weights.

    Raises:
        InputError: the folder is not empty.
        ModelError: a file cannot be written.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    with new_files(folder) as staged:
        nbytes = write_model(staged, model, tokenizer, "packed", masks, {"method": "fit"})
        RunSettings("packed", dtype, cache).write(staged)
        if profile is not None:
            profile.save(staged / PROFILE)
        told = json.dumps({**details, "file_bytes": nbytes}, indent=1, default=str) + "\n"
        (staged / REPORT).write_text(told, encoding="utf-8")
    return nbytes
