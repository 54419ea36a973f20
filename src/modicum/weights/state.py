"""State: each block's outcome in a folder, so that a run that was stopped goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modicum.errors import InputError, ModelError
from modicum.weights.layer import Layer
from modicum.weights.packed import pack, unpack
from modicum.whole_file import whole_file, write_whole

if TYPE_CHECKING:
    from modicum.weights.blocks import Matrix

_RUN = "run.json"


class State:
    """A folder with a file for each block that is done.

    Args:
        about: what the run hangs on: model, calibration, plan. A folder with another's is refused.

    Raises:
        InputError: the folder holds the state of another run, or cannot be written.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder = folder
        text = json.dumps(about, sort_keys=True, default=str)
        told = hashlib.sha256(text.encode()).hexdigest()
        run = folder / _RUN
        if run.is_file():
            if _digest(run) != told:
                raise InputError(
                    f"{folder} holds the state of a run with other settings, text or model: repeat those to "
                    "go on, give another folder, or remove it to begin anew"
                )
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(run, json.dumps({"digest": told, "about": text}))
        except OSError as error:
            raise InputError(
                f"cannot write {folder}: {error.strerror or error}; give a folder that can be written"
            ) from error

    def _path(self, number: int) -> Path:
        return self.folder / f"block-{number:04}.safetensors"

    def load(self, number: int, matrices: Sequence[Matrix]) -> list[tuple[Layer, Tensor]] | None:
        """A block's outcome, written into its matrices; None if it is not done."""
        path = self._path(number)
        if not path.is_file():
            return None
        found = []
        with safe_open(path, framework="pt") as file:
            rows = json.loads(file.metadata()["rows"])
            for index, (matrix, row) in enumerate(zip(matrices, rows, strict=True)):
                mask = unpack(file.get_tensor(f"{index}.mask"), matrix.weight.shape[1])
                values = file.get_tensor(f"{index}.values")
                whole = torch.zeros(matrix.weight.shape, dtype=values.dtype).masked_scatter_(mask, values)
                matrix.weight.copy_(whole)
                if matrix.bias is not None:
                    matrix.bias.data.copy_(file.get_tensor(f"{index}.bias"))
                found.append((Layer(**row), mask))
        return found

    def save(self, number: int, matrices: Sequence[Matrix], done: Sequence[tuple[Layer, Tensor]]) -> None:
        """Keep a block's outcome; the file appears whole or not at all.

        Raises:
            ModelError: it cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        for index, (matrix, (_, mask)) in enumerate(zip(matrices, done, strict=True)):
            kept = mask.cpu()
            tensors[f"{index}.mask"], tensors[f"{index}.values"] = pack(kept), matrix.weight.cpu()[kept]
            if matrix.bias is not None:
                tensors[f"{index}.bias"] = matrix.bias.data.cpu().contiguous()
        rows = json.dumps([asdict(row) for row, _ in done])
        try:
            with whole_file(self._path(number)) as part:
                save_file(tensors, part, metadata={"rows": rows})
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"cannot write {self._path(number)}: {error}; make room and run the same again, which goes "
                f"on from the {number} blocks that are done"
            ) from error

    def clear(self) -> None:
        """Remove what is no longer needed."""
        for path in (*self.folder.glob("block-*.safetensors"), self.folder / _RUN):
            path.unlink(missing_ok=True)


def _digest(path: Path) -> str | None:
    """What the state of a folder hangs on; None where the file does not say."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(found.get("digest")) if isinstance(found, dict) else None
