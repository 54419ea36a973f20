"""Losses of RSQ training: the task, noise of quantised layers, and distillation from high precision.

L = L_task + μ · Σ_l ‖y_l − f_l‖² / ‖f_l‖² + κ · KL(p_fp ‖ p_q), with y_l and f_l the outputs of layer l in
the quantised model and in the float one. Yao et al. 2020 (arXiv 2010.14841) distil "from high-precision
values", and the version of 2022 minimises quantisation noise, say the abstracts; the formula and the weights
are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from modicum.errors import InputError


@dataclass(frozen=True)
class RSQLossSettings:
    """Weights of the losses.

    Attributes:
        noise: μ.
        distillation: κ.

    Raises:
        InputError: a weight is negative.
    """

    noise: float = 0.1
    distillation: float = 1.0

    def __post_init__(self) -> None:
        if not (self.noise >= 0 and self.distillation >= 0):
            raise InputError(f"{self}: give weights of at least 0")


@contextmanager
def recorded_outputs(model: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Gives the latest outputs of the named layers, while it is open.

    Raises:
        InputError: the model has no such layer.
    """
    modules = dict(model.named_modules())
    missing = [name for name in names if name not in modules]
    if missing:
        raise InputError(f"the model has no layer {missing[0]!r}: give names of model.named_modules()")
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            found[name] = output

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def noise_loss(quantized: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> Tensor:
    """Σ_l ‖y_l − f_l‖² / ‖f_l‖² over layers of the same names.

    Raises:
        InputError: the layers are not the same, or there is none.
    """
    if not quantized or quantized.keys() != exact.keys():
        raise InputError(f"layers {sorted(quantized)} and {sorted(exact)}: give the same ones, at least one")
    parts = []
    for name, output in quantized.items():
        target = exact[name].detach()
        parts.append((output - target).square().sum() / target.square().sum().clamp_min(1e-30))
    total: Tensor = sum(parts[1:], start=parts[0])
    return total


def rsq_loss(
    task: Tensor,
    layers: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    logits: tuple[Tensor, Tensor],
    settings: RSQLossSettings | None = None,
) -> Tensor:
    """The whole loss.

    Args:
        task: the task's own loss, a scalar.
        layers: outputs of layers, of the quantised and of the float model.
        logits: [..., C], of the quantised and of the float model; the divergence is averaged over positions.
    """
    settings = settings or RSQLossSettings()
    student, teacher = logits
    divergence = F.kl_div(
        student.log_softmax(-1), teacher.detach().log_softmax(-1), reduction="none", log_target=True
    )
    loss = task + settings.distillation * divergence.sum(-1).mean()
    return loss + settings.noise * noise_loss(*layers) if settings.noise else loss
