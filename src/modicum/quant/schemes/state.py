"""A scheme in a state dict: what a layer's numbers were made for, as a tensor."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from modicum.errors import InputError
from modicum.quant.schemes.base import Scheme
from modicum.quant.schemes.limited import RSQWinograd


def scheme_state(scheme: Scheme) -> Tensor:
    """The scheme as JSON, uint8 [bytes]: a tensor, so that safetensors holds it too."""
    return torch.frombuffer(bytearray(json.dumps(_told(scheme)).encode()), dtype=torch.uint8)


def restored_scheme(state: Tensor, scheme: Scheme, name: str) -> Scheme:
    """A layer's scheme with the saved α.

    Args:
        state: what `scheme_state` gave.
        scheme: that of the layer which loads.
        name: of the layer, for errors.

    Raises:
        InputError: the saved scheme differs in anything but α, or the state is damaged.
    """
    try:
        saved: dict[str, Any] = json.loads(bytes(state.detach().cpu().to(torch.uint8).tolist()))
        alpha = saved.get("alpha")
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name}: the scheme in the state dict is damaged: save it again") from error
    if isinstance(scheme, RSQWinograd) and isinstance(alpha, int | float):
        scheme = replace(scheme, alpha=float(alpha))
    if _told(scheme) != saved:
        raise InputError(
            f"{name} has the scheme {_told(scheme)}, and the state dict was saved with {saved}: quantise the "
            "model with the settings that it was saved with before loading"
        )
    return scheme


def _told(scheme: Scheme) -> dict[str, Any]:
    return {"scheme": scheme.name, **asdict(scheme)}
