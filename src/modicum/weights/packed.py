"""Packed: a pruned model in a file that is as small as it says, and back, bit for bit.

One safetensors file. A pruned weight is two tensors: NAME.mask, uint8 [rows, ⌈d/8⌉], a bit per weight, the
lowest column in bit 0, and NAME.values, those kept, row by row. The mask is what was selected: a kept 0.0
stays. All else is as it was. What fits into 16 bits without loss (a model that was trained in them and loaded
in 32) is stored in 16. The header says format, shapes and dtypes, and holds a checksum.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from modicum.errors import ModelError

FILE = "packed.safetensors"
FORMAT = 1
_KEY = "modicum"
_TILE = 2**18
"""Weights that a processor unpacks at a time: few enough for its cache."""
_WIDE_TILE = 2**24


def pack(mask: Tensor) -> Tensor:
    """[..., d] bool -> [..., ⌈d/8⌉] uint8."""
    d = mask.shape[-1]
    padded = F.pad(mask.to(torch.uint8), (0, -d % 8))
    bits = padded.view(*mask.shape[:-1], -1, 8)
    return torch.sum(bits << torch.arange(8, dtype=torch.uint8, device=mask.device), -1, dtype=torch.uint8)


def unpack(bits: Tensor, d: int) -> Tensor:
    """[..., ⌈d/8⌉] uint8 -> [..., d] bool."""
    if bits.device.type == "cpu":  # numpy has it ready made
        return torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1, count=d, bitorder="little")).view(
            torch.bool
        )
    each = (bits.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return each.flatten(-2)[..., :d].bool()


def narrow(tensor: Tensor) -> torch.dtype:
    """The dtype of fewest bytes that holds all of its values."""
    if tensor.dtype == torch.float32:
        for dtype in (torch.bfloat16, torch.float16):
            if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
                return dtype
    return tensor.dtype


def bits_and_values(rows: int, width: int, kept: int, itemsize: int) -> int:
    """Bytes of a weight of which so many are kept."""
    return rows * -(-width // 8) + kept * itemsize


def header_bytes(entries: Mapping[str, tuple[tuple[int, ...], str, int]], about: str) -> int:
    """Bytes of the file before its tensors: entries name -> shape, dtype as safetensors names it, bytes."""
    at, found = 0, {}
    for name, (shape, dtype, size) in entries.items():
        found[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps({"__metadata__": {_KEY: about}, **found}, separators=(",", ":"))
    return 8 + -(-len(text.encode()) // 8) * 8


def untied(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's tensors by their names, of tied ones the first."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, value in model.state_dict().items():
        place = value.data_ptr(), tuple(value.shape)
        if value.numel() and place in seen:
            continue
        seen.add(place)
        yield name, value


def dense_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights in a file that has all of them, stored as narrowly as here."""
    return sum(value.numel() * narrow(value).itemsize for _, value in untied(model))


def tensors_of(model: nn.Module, masks: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What goes into the file, and what its header tells: shapes of pruned weights, dtypes of all; tied
    weights once.

    masks: of a parameter's name, True where kept; a parameter of several experts has theirs, [E, out, d].
    """
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    dtypes: dict[str, str] = {}
    for name, value in untied(model):
        tensor = value.detach().cpu().contiguous()
        dtypes[name] = str(tensor.dtype).removeprefix("torch.")
        mask = masks.get(name)
        if mask is None:
            tensors[name] = tensor.to(narrow(tensor))
            continue
        kept = mask.cpu()
        values = tensor[kept]
        tensors[f"{name}.mask"] = pack(kept)
        tensors[f"{name}.values"] = values.to(narrow(values))
        shapes[name] = list(tensor.shape)
    return tensors, {"pruned": shapes, "dtypes": dtypes}


def write(folder: Path, model: nn.Module, masks: Mapping[str, Tensor], about: dict[str, Any]) -> None:
    """Write a pruned model's weights. about: more entries for the header.

    Raises:
        OSError, SafetensorError: the file cannot be written, as where the disk is full.
    """
    tensors, told = tensors_of(model, masks)
    header = {"format": FORMAT, **told, **about}
    header["sha256"] = _digest(header, tensors)
    save_file(tensors, folder / FILE, metadata={_KEY: json.dumps(header)})


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a packed model.

    Raises:
        ModelError: the file is truncated, altered, foreign or of a newer format.
    """
    path = folder / FILE
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}; prune the model again") from error
    header = json.loads(text) if text else {}
    if header.get("format") != FORMAT:
        raise ModelError(
            f"{path} has format {header.get('format')}, this modicum reads {FORMAT}: get a newer modicum, or "
            "prune again"
        )
    if header.pop("sha256", None) != _digest(header, tensors):
        raise ModelError(f"{path} was altered or is damaged: its checksum differs; prune the model again")
    return header, tensors


def dense(header: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights as they were in the model, zeros where removed."""
    out = {}
    for name, value in tensors.items():
        base, _, kind = name.rpartition(".")
        if base not in header["pruned"]:
            out[name] = value.to(getattr(torch, header["dtypes"][name]))
        elif kind == "values":
            shape, dtype = header["pruned"][base], getattr(torch, header["dtypes"][base])
            mask = unpack(tensors[f"{base}.mask"], shape[-1])
            out[base] = torch.zeros(shape, dtype=dtype).masked_scatter_(mask, value.to(dtype))
    return out


def masks_of(header: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The masks, by the parameters' names."""
    return {name: unpack(tensors[f"{name}.mask"], shape[-1]) for name, shape in header["pruned"].items()}


def _digest(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    told = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        told.update(name.encode())
        told.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return told.hexdigest()


class PackedLinear(nn.Module):
    """A linear layer whose weight stays packed and is unpacked, some rows at a time, whenever it is used:
    small, and slower.

    Args:
        bits: [out, ⌈d/8⌉] uint8, as `pack` has it.
        values: [nnz], those kept, row by row; of any dtype that holds them.
        width: d.
    """

    def __init__(self, bits: Tensor, values: Tensor, width: int, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = width, bits.shape[0]
        kept = unpack(bits, width).sum(1)
        self.register_buffer("bits", bits)
        self.register_buffer("values", values)
        # Where each row starts in them; on the host, so that a GPU need not be waited for.
        self._starts = array("q", [0, *kept.cumsum(0).tolist()])
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def starts_nbytes(self) -> int:
        """Bytes of what says where each row starts."""
        return len(self._starts) * self._starts.itemsize

    def weight_rows(self, rows: list[int]) -> Tensor:
        """Some rows of the weight, unpacked: [len(rows), d]."""
        bits, values = self.get_buffer("bits"), self.get_buffer("values")
        mask = unpack(bits[rows], self.in_features)
        kept = [values[self._starts[row] : self._starts[row + 1]] for row in rows]
        return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter_(
            mask, torch.cat(kept)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        bits, values = self.get_buffer("bits"), self.get_buffer("values")
        size = max(1, (_TILE if values.device.type == "cpu" else _WIDE_TILE) // self.in_features)
        parts = []
        for start in range(0, self.out_features, size):
            end = min(start + size, self.out_features)
            mask = unpack(bits[start:end], self.in_features)
            weight = torch.zeros(mask.shape, dtype=inputs.dtype, device=inputs.device)
            own = values[self._starts[start] : self._starts[end]]
            weight.masked_scatter_(mask, own.to(inputs.dtype))
            parts.append(F.linear(inputs, weight))
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return out if self.bias is None else out + self.bias
