"""Checkpoint: a training that can go on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from modicum.errors import InputError, ModelError
from modicum.whole_file import whole_file

_KEY = "modicum"


@dataclass
class Progressed:
    """How far a training has come."""

    step: int = 0
    """Steps done."""
    losses: list[float] = field(default_factory=list)
    """Of each step."""


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A file with a model's weights and buffers, its optimizer's moments and the step.

    Attributes:
        path: of the file.
        digest: of what the training depends on: student, targets, settings.
    """

    path: Path
    digest: str

    def save(self, model: nn.Module, optimizer: torch.optim.Adam, progressed: Progressed) -> None:
        """Write the file, which appears whole or not at all.

        Raises:
            ModelError: it cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            tensors[f"{name}.weight"] = parameter.detach()
            for key, value in optimizer.state[parameter].items():
                tensors[f"{name}.{key}"] = value
        tensors |= {f"{name}.buffer": buffer for name, buffer in _saved_buffers(model)}
        told = {"digest": self.digest, "step": progressed.step, "losses": progressed.losses}
        on_cpu = {name: value.cpu().contiguous() for name, value in tensors.items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.path) as part:
                save_file(on_cpu, part, metadata={_KEY: json.dumps(told)})
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"cannot write {self.path}: {error}; make room and run the same again, which goes on from "
                "the last checkpoint"
            ) from error

    def load(self, model: nn.Module, optimizer: torch.optim.Adam) -> Progressed:
        """Put what was saved into model and optimizer; nothing is done where there is no file.

        Raises:
            InputError: it is of another training, or damaged.
        """
        if not self.path.exists():
            return Progressed()
        try:
            with safe_open(self.path, framework="pt") as file:
                told = json.loads(file.metadata()[_KEY])
                if told["digest"] != self.digest:
                    raise InputError(
                        f"{self.path} is of a training with another student, other targets or settings: "
                        "repeat those to go on, give another folder, or remove it to begin anew"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self._fill(model, optimizer, tensors)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{self.path} cannot be read ({error}): remove it to begin the training anew"
            ) from error
        return Progressed(told["step"], told["losses"])

    def remove(self) -> None:
        """Remove the file, if there is one."""
        self.path.unlink(missing_ok=True)

    def _fill(self, model: nn.Module, optimizer: torch.optim.Adam, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in model.named_parameters():
            parameter.data.copy_(tensors[f"{name}.weight"])
            if f"{name}.step" not in tensors:
                continue  # it had no gradient yet
            # Adam counts steps in a tensor that stays on the host, unless it is fused.
            host_or_device = parameter.device if optimizer.defaults["fused"] else "cpu"
            state: dict[str, Any] = {"step": tensors[f"{name}.step"].to(host_or_device)}
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = tensors[f"{name}.{key}"].to(parameter.device)
            optimizer.state[parameter] = state
        for name, buffer in _saved_buffers(model):
            buffer.copy_(tensors[f"{name}.buffer"])


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a model saves with its weights, such as the running statistics of batch normalisation."""
    saved = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if saved.get(name) is buffer:
            yield name, buffer
