"""Checkpoint: a pruned model written to a folder, packed or as transformers writes its models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from modicum.errors import InputError, ModelError
from modicum.weights import packed
from modicum.weights.new_folder import CONFIG, REPORT, new_files
from modicum.weights.plain_model import plain_model
from modicum.weights.prune import PruneReport

FORMATS = ("packed", "dense")


def save(
    report: PruneReport,
    model: nn.Module,
    tokenizer: Any,
    folder: str | Path,
    format: str = "packed",
    details: Mapping[str, Any] | None = None,
) -> int:
    """Write a pruned model to a folder: weights, configuration, tokenizer and report.json.

    All files are written to a temporary folder and moved when they are complete, config.json last. After an
    error or an interrupt none of them is left.

    Args:
        report: what `modicum.prune` returned for this model.
        tokenizer: written too, if it is not None.
        folder: new or empty.
        format: "packed" writes a bit per weight and the values kept, in one file that `modicum.load` reads.
            "dense" writes an ordinary checkpoint, as `save_pretrained` does, with zeros where weights were
            removed: as large as the model's, in the model's dtype, for any software that loads its kind.
        details: more entries for report.json, beside the report's own, the format and the bytes.

    Returns:
        Bytes of the files that hold the weights.

    Raises:
        InputError: the format is not known, or the folder is not empty.
        ModelError: the report is of another model, or a file cannot be written.
    """
    plain = plain_model(model)
    check_format(format)
    _check_report(report, plain)
    with new_files(Path(folder)) as staged:
        about = {"method": report.method, "pattern": report.pattern, "sparsity": report.sparsity}
        nbytes = write_model(staged, plain, tokenizer, format, report.masks, about)
        told = {**(details or {}), "format": format, "file_bytes": nbytes}
        told |= {"packed_bytes": nbytes if format == "packed" else None, **report.to_dict()}
        (staged / REPORT).write_text(json.dumps(told, indent=1, default=str) + "\n", encoding="utf-8")
    return nbytes


def write_model(
    staged: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    format: str,
    masks: Mapping[str, Tensor],
    about: Mapping[str, Any],
) -> int:
    """Write weights, configuration and tokenizer to a folder that is there; the bytes of the weights' files.

    Args:
        masks: of a packed file, by the parameters' names.
        about: more entries for its header.
    """
    if format == "packed":
        packed.write(staged, model, masks, dict(about))
        model.config.save_pretrained(staged)
    else:
        _write_dense(staged, model)
    _write_generation_config(staged, model)
    if tokenizer is not None:
        tokenizer.save_pretrained(staged)
        _copy_vocabulary(staged, tokenizer)
    files = list(staged.glob("*.safetensors"))
    for file in files:  # safetensors lets nobody but the owner read it
        shutil.copymode(staged / CONFIG, file)
    return sum(file.stat().st_size for file in files)


def check_format(format: str) -> None:
    """Raise unless a format is known.

    Raises:
        InputError: it is not.
    """
    if format not in FORMATS:
        raise InputError(f"format is {format!r}; choose one of {', '.join(FORMATS)}")


def _check_report(report: PruneReport, model: PreTrainedModel) -> None:
    tensors: dict[str, Tensor] = model.state_dict()
    for name, mask in report.masks.items():
        value = tensors.get(name)
        if value is not None and type(value) is not Tensor:
            raise ModelError(
                f"{name} is a {type(value).__name__}, which cannot be written: save the model before its "
                "weights are given to sparse products"
            )
        if value is None or value.shape != mask.shape or bool(value.cpu()[~mask.cpu()].count_nonzero()):
            raise ModelError(
                f"the report is not of this model as it is now: {name} is "
                f"{'missing' if value is None else 'not pruned as its mask says'}; give the model that was "
                "pruned"
            )


def _write_dense(folder: Path, model: PreTrainedModel) -> None:
    """Weights and configuration as transformers writes them, by the names of the original checkpoint."""
    save_pretrained: Any = model.save_pretrained
    generation = model.generation_config
    model.generation_config = GenerationConfig()  # a stand-in: see `_write_generation_config`
    try:
        save_pretrained(folder)
    finally:
        model.generation_config = generation


def _write_generation_config(folder: Path, model: PreTrainedModel) -> None:
    """Write the generation config as it is. Its `save_pretrained` refuses settings that published models have
    and that it reads itself, such as a temperature without sampling.
    """
    if model.generation_config is not None:
        model.generation_config.to_json_file(folder / "generation_config.json")


def _copy_vocabulary(folder: Path, tokenizer: Any) -> None:
    """Copy vocabulary files that the tokenizer was read from and does not write, such as the SentencePiece
    tokenizer.model that converters of other software ask for.
    """
    source = getattr(tokenizer, "name_or_path", "")
    for name in getattr(tokenizer, "vocab_files_names", {}).values():
        if not source or (folder / name).exists():
            continue
        try:
            found = cached_file(
                source, name, local_files_only=True, _raise_exceptions_for_missing_entries=False
            )
        except (OSError, ValueError):
            continue
        if found is not None:
            shutil.copyfile(found, folder / name)
