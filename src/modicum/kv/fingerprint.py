"""Fingerprint: checksums of a few weights, by which saved data recognises the model that it was made with.

A saved cache holds keys and values that the weights at that time produced. With other weights (pruned,
a merged adapter, trained on) it would continue with wrong text and no error. Reading all weights takes too
long, so parts of a few rows of every matrix in the first, middle and last decoder layer stand for them.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modicum.kv.offload import offloaded_value

_ROWS, _COLUMNS = 3, 1024
"""Rows read from each matrix, and columns of each."""

Checksums = dict[str, int | None]
"""Name of a matrix -> CRC-32 of its sampled rows; None where the values cannot be read here."""


def embedding_checksum(model: PreTrainedModel) -> int:
    """CRC-32 of the first 8 input embeddings as float32; 0 where they cannot be read."""
    embeddings: Any = model.get_input_embeddings()
    weight = _values(embeddings, "weight", embeddings.weight)
    return 0 if weight is None else _checksum(weight[:8]) or 0


def weight_checksums(model: PreTrainedModel) -> Checksums:
    """Checksums of rows of each matrix in the first, middle and last decoder layer.

    Floating-point values are compared as float32, whatever the device. Quantised values are compared as they
    are stored. Offloaded weights are read where accelerate keeps them, if that is in memory.
    """
    layers = _decoder_layers(model)
    found: Checksums = {}
    for index in sorted({0, len(layers) // 2, len(layers) - 1}) if layers else ():
        for name, rows in _matrices(layers[index]):
            found[f"{index}.{name}"] = None if rows is None else _checksum(rows)
    return found


def weights_digest(model: PreTrainedModel) -> str:
    """16 hex digits that stand for the model's type, `weight_checksums` and input embeddings; "" where some
    of the weights cannot be read here. The same in float32 and in the 16 bits that it was saved in.
    """
    checksums = weight_checksums(model)
    embeddings = embedding_checksum(model)
    if not checksums or None in checksums.values() or not embeddings:
        return ""
    model_type = model.config.get_text_config(decoder=True).model_type
    text = json.dumps([model_type, embeddings, checksums], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def difference(saved: Checksums, present: Checksums) -> str | None:
    """Name of the first matrix that differs, or None. Matrices unreadable on either side are not compared."""
    for name in sorted(saved.keys() | present.keys()):
        if name not in saved or name not in present:
            return name
        if saved[name] != present[name] and None not in (saved[name], present[name]):
            return name
    return None


def _decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    number = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0)
    modules: nn.Module = model
    stacks = [
        (name, module)
        for name, module in modules.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == number
    ]
    return list(min(stacks, key=lambda pair: len(pair[0]))[1]) if stacks else []


def _matrices(layer: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Name and sampled rows [n, columns] of each weight with at least two dimensions."""
    for path, module in layer.named_modules():
        prefix = f"{path}." if path else ""
        if hasattr(module, "weight_rows"):  # packed: the same weights as unpacked
            yield f"{prefix}weight", module.weight_rows(list(_sample(module.out_features)))
            continue
        stored = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in stored:
            if tensor.dim() < 2 or name in module._non_persistent_buffers_set:
                continue
            values = _values(module, name, tensor)
            yield f"{prefix}{name}", None if values is None else _rows(values)


def _rows(weight: Tensor) -> Tensor | None:
    try:
        flat = weight.detach().flatten(0, -2)
        rows = _sample(flat.shape[0])
        return flat[rows.start : rows.stop : rows.step, :_COLUMNS]
    except (NotImplementedError, RuntimeError, TypeError):  # a tensor subclass that has no rows
        return None


def _sample(rows: int) -> range:
    """Evenly spaced rows, the same ones however a matrix is stored."""
    step = max(1, rows // _ROWS)
    return range(step // 2, min(rows, step // 2 + _ROWS * step), step)


def _values(module: nn.Module, name: str, tensor: Tensor) -> Tensor | None:
    """A weight's values; of an offloaded weight those in accelerate's map, if it holds them in memory."""
    if not tensor.is_meta:
        return tensor
    return offloaded_value(module, name, from_disk=False)


def _checksum(rows: Tensor) -> int | None:
    rows = rows[:, :_COLUMNS]
    wide = rows.detach().to("cpu", torch.float32 if rows.is_floating_point() else rows.dtype)
    return zlib.crc32(wide.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
