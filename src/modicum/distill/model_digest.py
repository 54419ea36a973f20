"""Model digest: tells a model from any other, by all of its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modicum.kv.offload import offloaded_value

_CHUNK = 2**24
"""Numbers that are read at a time."""
_NOT_COMPUTED_WITH = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "quantization_config",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Settings of a model that leave its logits as they are, or are of how its weights are held."""


def model_digest(model: PreTrainedModel, masks: Mapping[str, Tensor] | None = None) -> str:
    """16 hex digits that stand for the model's settings, all weights and saved buffers, and masks; "" where
    some of the weights cannot be read here.

    Floating-point values are read as float32, so the digest is the same in the 16 bits that a model was saved
    in. A layer that is held packed counts as its weights do unpacked. A weight of several layers is read
    once.

    Args:
        model: on any device.
        masks: bool, by names, which are part of what is told apart.
    """
    settings = model.config.get_text_config(decoder=True).to_dict()
    told = {name: value for name, value in settings.items() if name not in _NOT_COMPUTED_WITH}
    sha = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    for name, value in _saved(model):
        if value is None:
            return ""
        try:
            _add(sha, name, value)
        except (NotImplementedError, TypeError):  # a tensor subclass that does not show its values
            return ""
    for name, mask in sorted((masks or {}).items()):
        _add(sha, f"{name}.mask", mask)
    return sha.hexdigest()[:16]


def _saved(model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Weights and saved buffers by name; None where the values are not in memory."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        stored: list[tuple[str, Tensor]] = [*module.named_parameters(recurse=False)]
        if hasattr(module, "weight_rows"):  # packed: the same weights as unpacked
            yield f"{prefix}weight", module.weight_rows(list(range(module.out_features)))
        else:
            buffers = module.named_buffers(recurse=False)
            stored += [(name, one) for name, one in buffers if name not in module._non_persistent_buffers_set]
        for name, tensor in stored:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                value = offloaded_value(module, name, from_disk=False) if tensor.is_meta else tensor
                yield f"{prefix}{name}", value


def _add(sha: Any, name: str, tensor: Tensor) -> None:
    sha.update(f"{name} {tuple(tensor.shape)} ".encode())
    for part in torch.split(tensor.detach().reshape(-1), _CHUNK):
        wide = part.to("cpu", torch.float32 if part.is_floating_point() else part.dtype)
        sha.update(wide.contiguous().view(torch.uint8).numpy())
