"""Byte count: how large the file of a compact recognizer is, before there is one.

    data  = Σ over unique matrices [min(⌈stored·b/8⌉ + ⌈blocks/8⌉, ⌈all·b/8⌉) + 4·outputs] + 4·others
    file  = 8 + header, padded to a multiple of 8, + data

where `stored` are the weights that are not pruned, in blocks for which a mask has a bit each; a matrix for
which that is no less than all its weights has no mask. `others` are the numbers of norms, biases and buffers.
A matrix that layers share is there once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from modicum.speech.acoustic_model import AcousticModel
from modicum.speech.compact.compressed import CompactRecognizer, matrices
from modicum.speech.compact.pruning import (
    expand_blocks,
    is_mask_worthwhile,
    is_prunable,
    mask_nbytes,
    num_blocks,
    num_kept,
    values_nbytes,
)

COUNTER = "num_batches_tracked"
"""Buffers of norms that are of no use after the training; they are not stored."""


@dataclass(frozen=True)
class Section:
    """One entry of the file: the numbers of one kind of all tensors, one after another."""

    dtype: str
    """As safetensors names it."""
    nbytes: int
    itemsize: int


Sections = dict[str, Section]


def stored_others(model: AcousticModel) -> dict[str, Tensor]:
    """Norms, biases and their statistics, by name: what is stored as float32."""
    kept = {name: one for name, one in model.state_dict().items() if not name.endswith(COUNTER)}
    return {name: one for name, one in kept.items() if name not in matrices(model)}


def sections(compact: CompactRecognizer) -> Sections:
    """Of a recognizer as it is."""
    values = masks = outputs = 0
    for tensor in compact.tensors.values():
        stored = tensor.integers.numel()
        if tensor.is_kept is not None:
            stored = int(expand_blocks(tensor.is_kept, tensor.integers.shape, compact.block).sum())
            masks += mask_nbytes(tensor.is_kept.numel())
        values += values_nbytes(stored, compact.bits)
        outputs += len(tensor.scale)
    return _sections(values, masks, outputs, compact.recognizer.model, compact.bits)


def planned_sections(model: AcousticModel, bits: int, sparsity: float, block: int) -> Sections:
    """Of a model that will have this sparsity in each matrix that can be pruned.

    With blocks of 4 a row whose length is no multiple may have fewer weights stored than are counted here. So
    may a model that has more zeros.
    """
    values = masks = outputs = 0
    for weight in matrices(model).values():
        stored = weight.numel()
        if sparsity and is_prunable(weight):
            blocks = num_blocks(weight.shape, block)
            kept = min(stored, block * num_kept(blocks, sparsity))
            if is_mask_worthwhile(stored, kept, blocks, bits):
                stored, masks = kept, masks + mask_nbytes(blocks)
        values += values_nbytes(stored, bits)
        outputs += weight.shape[0]
    return _sections(values, masks, outputs, model, bits)


def file_nbytes(parts: Sections, metadata: Mapping[str, str]) -> int:
    """Bytes of a file with these sections."""
    return len(file_header(parts, metadata)) + sum(part.nbytes for part in parts.values())


def file_header(parts: Sections, metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with: the length of the header in 8 bytes, and the header."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, part in parts.items():
        end = at + part.nbytes
        table[name] = {
            "dtype": part.dtype,
            "shape": [part.nbytes // part.itemsize],
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _sections(values: int, masks: int, outputs: int, model: AcousticModel, bits: int) -> Sections:
    others = sum(one.numel() for one in stored_others(model).values())
    # Numbers of 4 bytes first, so that they are aligned.
    return {
        "others": Section("F32", 4 * others, 4),
        "scales": Section("F32", 4 * outputs, 4),
        "values": Section("I8" if bits == 8 else "U8", values, 1),
        "masks": Section("U8", masks, 1),
    }
