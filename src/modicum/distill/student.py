"""Student: a model in a folder, packed or dense, whose removed weights stay removed while it learns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modicum.errors import ModelError
from modicum.loading import find, load
from modicum.weights import packed
from modicum.weights.checkpoint import write_model
from modicum.weights.new_folder import REPORT, new_files
from modicum.weights.plain_model import plain_model


@dataclass
class Student:
    """A model that learns.

    Attributes:
        model: in float32, whatever it was stored in, as small steps would be lost in 16 bits.
        format: "packed" or "dense", as its folder was.
        masks: by the parameters' names, True where a weight is kept. Of a packed file they are its masks; of
        a
            dense checkpoint, what is not exactly 0 in matrices other than embeddings and output layer.
        dtype: of the model as it was stored.
        stored: by the parameters' names, the dtype of fewest bytes that held their values.
        about: what the packed file said of how it was pruned.
        report: the folder's report.json, or nothing.
    """

    model: PreTrainedModel
    tokenizer: Any
    format: str
    masks: dict[str, Tensor]
    dtype: torch.dtype
    stored: dict[str, torch.dtype]
    about: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, name: str | Path, device: str = "auto") -> Student:
        """Load it.

        Args:
            name: a folder, or another name that `modicum.load` takes.

        Raises:
            ModelError: it cannot be loaded, or its weights cannot be trained.
        """
        loaded, tokenizer = load(name, device=device, weights="dense")
        model = plain_model(loaded)
        frozen = [n for n, p in model.named_parameters() if not p.is_floating_point()]
        if frozen:
            raise ModelError(f"{frozen[0]} is quantized and cannot learn: give a student in floating point")
        dtype = model.dtype
        stored = {n: packed.narrow(p.detach()) for n, p in model.named_parameters()}
        source = find(str(name))
        about: dict[str, Any] = {}
        report: dict[str, Any] = {}
        if isinstance(source, Path) and (source / packed.FILE).is_file():
            header, tensors = packed.read(source)
            masks = packed.masks_of(header, tensors)
            about = {k: v for k, v in header.items() if k not in ("format", "pruned", "dtypes")}
            format = "packed"
        else:
            masks, format = _zeros(model), "dense"
        if isinstance(source, Path) and (source / REPORT).is_file():
            report = json.loads((source / REPORT).read_text(encoding="utf-8"))
        _cast(model, torch.float32)
        device_of = next(model.parameters()).device
        masks = {name: mask.to(device_of) for name, mask in masks.items()}
        return cls(model, tokenizer, format, masks, dtype, stored, about, report)

    @property
    def sparsity(self) -> float:
        """The share of the masked parameters' weights that is removed."""
        total = sum(mask.numel() for mask in self.masks.values())
        return 1 - sum(int(mask.sum()) for mask in self.masks.values()) / total if total else 0.0

    @property
    def num_classes(self) -> int:
        """Tokens that it gives logits for."""
        head: Any = self.model.get_output_embeddings()
        return int(head.weight.shape[0])

    def removed(self) -> list[tuple[torch.nn.Parameter, Tensor]]:
        """Each masked parameter with a mask of what is removed."""
        parameters = dict(self.model.named_parameters())
        return [(parameters[name], ~mask) for name, mask in self.masks.items()]

    @torch.no_grad()
    def round(self) -> None:
        """Round weights to what they were stored in, so that the file does not grow. A kept weight of a dense
        checkpoint that would become 0 becomes the smallest number above it: its mask is where zeros are.
        """
        for name, parameter in self.model.named_parameters():
            stored = self.stored[name]
            parameter.copy_(parameter.to(stored).to(parameter.dtype))
            if self.format == "dense" and name in self.masks:
                is_lost = self.masks[name] & (parameter == 0)
                parameter.masked_fill_(is_lost, torch.finfo(stored).tiny)

    def save(self, folder: Path, details: Mapping[str, Any]) -> int:
        """Write it in the format it came in, with the report it came with and `details` under "distilled".

        Returns:
            Bytes of the files that hold the weights.

        Raises:
            InputError: the folder is not empty.
            ModelError: a file cannot be written, or a removed weight is not 0.
        """
        for parameter, is_removed in self.removed():
            if bool(parameter[is_removed].count_nonzero()):
                raise ModelError("a removed weight is not 0: train the student with its masks")
        self.round()
        _cast(self.model, self.dtype)
        try:
            with new_files(folder) as staged:
                masks = self.masks if self.format == "packed" else {}
                nbytes = write_model(staged, self.model, self.tokenizer, self.format, masks, self.about)
                told = {**self.report, "format": self.format, "file_bytes": nbytes}
                told |= {"packed_bytes": nbytes if self.format == "packed" else None}
                told |= {"distilled": dict(details)}
                (staged / REPORT).write_text(json.dumps(told, indent=1, default=str) + "\n", encoding="utf-8")
        finally:
            _cast(self.model, torch.float32)
        return nbytes


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast parameters, and no buffers: rotary frequencies would lose digits in 16 bits."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _zeros(model: PreTrainedModel) -> dict[str, Tensor]:
    """Masks of a dense checkpoint's parameters that have zeros; embeddings and the output layer have none."""
    ends = {
        id(module.weight)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None
    }
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and id(parameter) not in ends:
            mask = parameter.detach() != 0
            if not bool(mask.all()):
                found[name] = mask
    return found
