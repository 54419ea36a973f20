"""Packed file: a compact recognizer in one safetensors file.

Four entries hold the numbers of all tensors, one after another in the order of the model's parameters:
`others` (norms, biases and their statistics, float32), `scales` (float32), `values` (whole numbers; in 4 bits
two in a byte, the first in the lower half, each plus 8) and `masks` (a bit for each block, the first in the
lowest bit; each mask begins a new byte). The metadata under "modicum" say the rest as JSON, with a digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import modicum.speech.sizes  # noqa: F401  # registers the models
from modicum.errors import ModelError
from modicum.speech.acoustic_model import settings_from_dict
from modicum.speech.compact.byte_count import COUNTER, file_header, sections, stored_others
from modicum.speech.compact.compressed import CompactRecognizer, CompressedTensor, matrices
from modicum.speech.compact.pruning import expand_blocks, num_blocks
from modicum.speech.features import FeatureSettings
from modicum.speech.recognizer import Recognizer
from modicum.speech.tokens import TokenSet
from modicum.whole_file import whole_file

_KEY = "modicum"
_FORMAT = 1


def save_packed(compact: CompactRecognizer, path: str | Path) -> int:
    """Write the file, which appears whole or not at all; its bytes.

    Raises:
        ModelError: it cannot be written.
    """
    path = Path(path)
    parts = _encoded(compact)
    counted = sections(compact)
    metadata = packed_metadata(compact, _digest(parts.values()))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, is_durable=True) as part, open(part, "wb") as file:
            file.write(file_header(counted, metadata))
            for name in counted:
                file.write(parts[name])
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error.strerror or error}; give another place") from error
    return path.stat().st_size


def load_packed(path: str | Path) -> CompactRecognizer:
    """Read the file that `save_packed` wrote.

    Raises:
        ModelError: there is none, it is damaged, or of a newer format.
    """
    path = Path(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            parts = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118  # no dict
        if _KEY not in metadata:
            raise ModelError(f"{path} is no packed recognizer: give a file that modicum speech pack wrote")
        told: dict[str, Any] = json.loads(metadata[_KEY])
        if told["format"] != _FORMAT:
            raise ModelError(
                f"{path} has format {told['format']}, this modicum reads {_FORMAT}: get a newer modicum"
            )
        names = ("others", "scales", "values", "masks")
        if _digest(parts[name].tobytes() for name in names) != told["digest"]:
            raise ModelError(f"{path} is damaged, its digest is not that of its numbers: copy it again")
        return _decoded(told, parts)
    except FileNotFoundError as error:
        raise ModelError(f"there is no file {path}: give one that modicum speech pack wrote") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path} cannot be read as a packed recognizer ({error}): copy it again") from error


def packed_metadata(compact: CompactRecognizer, digest: str = "0" * 32) -> dict[str, str]:
    """What the header says of a recognizer."""
    sparse = [name for name, one in compact.tensors.items() if one.is_kept is not None]
    return recognizer_metadata(compact.recognizer, compact.bits, compact.block, sparse, digest)


def recognizer_metadata(
    recognizer: Recognizer, bits: int, block: int, sparse: Sequence[str], digest: str = "0" * 32
) -> dict[str, str]:
    """The same of a recognizer that is not compressed yet; sparse: the matrices that will have masks."""
    told = {
        "format": _FORMAT,
        "bits": bits,
        "block": block,
        "sparse": list(sparse),
        "model": recognizer.model.settings.to_dict(),
        "features": asdict(recognizer.features),
        "tokens": recognizer.tokens.to_json(),
        "about": dict(recognizer.about),
        "digest": digest,
    }
    return {_KEY: json.dumps(told, ensure_ascii=False, separators=(",", ":"))}


def _digest(parts: Iterable[bytes]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()[:32]


def _encoded(compact: CompactRecognizer) -> dict[str, bytes]:
    others = stored_others(compact.recognizer.model).values()
    values, masks = [], []
    for tensor in compact.tensors.values():
        integers = tensor.integers
        if tensor.is_kept is None:
            stored = integers.flatten()
        else:
            stored = integers[expand_blocks(tensor.is_kept, integers.shape, compact.block)]
            masks.append(np.packbits(tensor.is_kept.flatten().numpy(), bitorder="little").tobytes())
        values.append(_pack(stored.numpy(), compact.bits))
    return {
        "others": b"".join(_floats(one) for one in others),
        "scales": b"".join(_floats(one.scale) for one in compact.tensors.values()),
        "values": b"".join(values),
        "masks": b"".join(masks),
    }


def _decoded(told: dict[str, Any], parts: dict[str, Any]) -> CompactRecognizer:
    tokens, features = TokenSet.from_json(told["tokens"]), FeatureSettings(**told["features"])
    model = settings_from_dict(told["model"]).build(features.num_mels, tokens.num_classes)
    bits, block, sparse = int(told["bits"]), int(told["block"]), set(told["sparse"])
    others, scales = _Reader(parts["others"]), _Reader(parts["scales"])
    values, masks = _Reader(parts["values"]), _Reader(parts["masks"])
    tensors = {}
    state = {name: one for name, one in model.state_dict().items() if name.endswith(COUNTER)}
    for name, one in stored_others(model).items():
        state[name] = torch.from_numpy(others.take(one.numel())).view_as(one)
    for name, weight in matrices(model).items():
        kept, num = None, weight.numel()
        is_stored = torch.ones(weight.shape, dtype=torch.bool)
        if name in sparse:
            blocks = num_blocks(weight.shape, block)
            bytes_of_mask = masks.take(-(-blocks // 8))
            flags = np.unpackbits(bytes_of_mask, count=blocks, bitorder="little").astype(bool)
            kept = torch.from_numpy(flags).view(weight.shape[0], -1)
            is_stored = expand_blocks(kept, weight.shape, block)
            num = int(is_stored.sum())
        integers = torch.zeros(weight.shape, dtype=torch.int8)
        integers[is_stored] = torch.from_numpy(_unpack(values.take(-(-num * bits // 8)), num, bits))
        scale = torch.from_numpy(scales.take(weight.shape[0]))
        tensors[name] = CompressedTensor(integers, scale, kept)
        state[name] = tensors[name].weight
    for reader in (others, scales, values, masks):
        reader.check_finished()
    model.load_state_dict(state)
    recognizer = Recognizer(model.eval(), tokens, features, told["about"])
    return CompactRecognizer(recognizer, tensors, bits, block)


class _Reader:
    """Numbers of an entry, taken from its front."""

    def __init__(self, numbers: Any) -> None:
        self._numbers, self._at = numbers, 0

    def take(self, num: int) -> Any:
        start, self._at = self._at, self._at + num
        if self._at > len(self._numbers):
            raise ValueError(f"an entry has {len(self._numbers)} numbers and at least {self._at} are needed")
        return self._numbers[start : self._at].copy()

    def check_finished(self) -> None:
        if self._at != len(self._numbers):
            raise ValueError(f"an entry has {len(self._numbers)} numbers and only {self._at} are needed")


def _floats(tensor: Tensor) -> bytes:
    numbers: bytes = tensor.detach().contiguous().numpy().astype("<f4").tobytes()
    return numbers


def _pack(integers: Any, bits: int) -> bytes:
    if bits == 8:
        return bytes(integers.tobytes())
    halves = (integers + 8).astype(np.uint8)
    halves = np.append(halves, np.zeros(len(halves) % 2, dtype=np.uint8))
    return bytes((halves[::2] | halves[1::2] << 4).tobytes())


def _unpack(stored: Any, num: int, bits: int) -> Any:
    if bits == 8:
        return stored.astype(np.int8)
    halves = np.stack([stored & 15, stored >> 4], 1).reshape(-1)[:num]
    return halves.astype(np.int8) - np.int8(8)
