"""How a model turns its keys: read from its rotary embedding, and checked on the model itself.

Frequencies and scaling are those of the model's own module, so every kind whose frequencies stay as they are
is exact. Which dimensions are a pair is found out: one token is shown to the model at three positions, and
the keys of every layer must be each other's, turned. A model of which that is not true is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modicum.errors import ModelError
from modicum.kv.attention_override import attention_override, once
from modicum.kv.offload import execution_device
from modicum.kv.precision import without_autocast
from modicum.kv.shape import Shape
from modicum.kv.turning import Rotary, Turning

STATIC = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embeddings whose frequencies do not hang on the length of the sequence."""

_FULL = "full_attention"
_PROBES = (0, 7, 611)
"""Positions at which a token is shown; at 0 nothing is turned."""

_found: WeakKeyDictionary[PreTrainedModel, Rotary | str] = WeakKeyDictionary()
"""Or why there is none."""


def turning_of(model: PreTrainedModel) -> Turning:
    """The model's rotary embedding in both directions, found and checked once.

    Raises:
        ModelError: the model has no rotary embedding, or one that cannot be renumbered; says why.
    """
    return Turning(
        rotary_of(model, "positions cannot be renumbered", "leave positions='original'"), model.dtype
    )


def rotary_of(model: PreTrainedModel, refused: str, remedy: str) -> Rotary:
    """How the model turns queries and keys, found and checked once.

    Raises:
        ModelError: it does not, or not in a way that can be done again; says what is `refused` for which
            reason, and the remedy.
    """
    found = once(_found, model, lambda: _find(model))
    if isinstance(found, str):
        raise ModelError(f"{found}, so {refused}: {remedy}")
    return found


def _find(model: PreTrainedModel) -> Rotary | str:
    name = type(model).__name__
    rotary = next(_rotaries(model), None)
    if rotary is None:
        return f"{name} has no rotary embedding (learned tables, ALiBi, or none at all)"
    if rotary.kind not in STATIC:
        return (
            f"{name} has rotary positions of the kind {rotary.kind!r}, whose frequencies change with the "
            f"length (those of {', '.join(STATIC)} do not)"
        )
    keys = {at: _keys(model, at) for at in _PROBES}
    for neighbours in (False, True):
        found = replace(rotary, neighbours=neighbours)
        if all(_serves(Turning(found, model.dtype), keys, layer) for layer in Shape.of(model).full):
            return found
    return (
        f"{name} turns its keys in a way that could not be done again (several kinds of rotary embedding, "
        "or one of its own)"
    )


def _rotaries(model: PreTrainedModel) -> Iterator[Rotary]:
    """Rotary embeddings of the layers with full attention."""
    for module in model.modules():
        kind: Any = getattr(module, "rope_type", "default")
        prefix = ""
        if hasattr(module, f"{_FULL}_inv_freq"):  # one for each type of layer, as in Gemma 3
            kind, prefix = kind[_FULL], f"{_FULL}_"
        speed, scale = (getattr(module, prefix + part, None) for part in ("inv_freq", "attention_scaling"))
        if isinstance(speed, Tensor) and scale is not None:
            wide = torch.promote_types(speed.dtype, torch.float32)  # a model cast to 16 bits may cast it too
            yield Rotary(str(kind), speed.detach().to(wide), float(scale), neighbours=False)


def _serves(turning: Turning, keys: dict[int, list[Tensor]], layer: int) -> bool:
    """Whether a layer's keys at one position are those at another, turned, and turned back."""
    first = keys[0][layer]
    if 2 * len(turning.rotary.speed) > first.shape[-1]:
        return False
    if torch.equal(first, keys[_PROBES[1]][layer]):
        return False  # not turned at all
    plain = turning.back(first, torch.tensor([[0]], device=first.device))
    size = float(first.abs().max())
    close = size * (1e-4 if first.dtype.itemsize >= 4 else 0.03)
    for at, every in keys.items():
        key = every[layer]
        where = torch.tensor([[at]], device=key.device)
        if float((turning.to(plain, where[None], at + 1) - key).abs().max()) > close:
            return False
        if float((turning.back(key, where) - plain).abs().max()) > close:
            return False
    return True


@torch.no_grad()
def _keys(model: PreTrainedModel, at: int) -> list[Tensor]:
    """Every layer's key [1, H, 1, D] of one token that stands at a position.

    A token that is alone sees itself only, so its hidden states are the same wherever it stands.
    """
    found: list[Tensor] = []

    def listen(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        found.append(key.detach())
        group = query.shape[1] // value.shape[1]
        return value.repeat_interleave(group, dim=1).transpose(1, 2).contiguous(), None

    device = execution_device(model)
    ids = torch.tensor([[1]], device=device)
    with attention_override(model, listen, "shown a token"), without_autocast(device):
        model(input_ids=ids, position_ids=torch.tensor([[at]], device=device), use_cache=False)
    return found
