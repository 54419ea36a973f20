"""Snapshot: a compressed cache in a file: safetensors, with what else there is to know as JSON in its
header.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from modicum.errors import CacheError, ModicumError, SnapshotError
from modicum.kv.budget import Budget
from modicum.kv.fingerprint import Checksums, difference, weight_checksums
from modicum.kv.layer import BudgetLayer
from modicum.kv.offload import execution_device
from modicum.kv.recurrent import RecurrentLayer
from modicum.kv.shape import Shape
from modicum.kv.unwrap import unwrap
from modicum.kv.window import WindowLayer
from modicum.whole_file import whole_file

if TYPE_CHECKING:
    from modicum.kv.bank import Bank
    from modicum.kv.cache import BudgetCache

FORMAT = 3
"""Earlier ones are read. 1 has original positions and the model's dtype only. 1 and 2 have a checksum of the
input embeddings, and none of the decoder layers' weights.
"""
_KEY = "modicum"

C = TypeVar("C", bound="BudgetCache")


def save(cache: BudgetCache, path: Path) -> None:
    """Write a cache; the file appears whole or not at all."""
    tensors: dict[str, Tensor] = {}
    layers = []
    for index, layer in enumerate(cache.layers):
        entry: dict[str, Any] = {"seen": getattr(layer, "seen", cache.seen)}
        states = layer if isinstance(layer, RecurrentLayer) else getattr(layer, "states", None)
        if states is not None:
            kept = states.state_dict()
            entry["states"] = sorted(kept)
            tensors |= {f"{index}.{name}": tensor for name, tensor in kept.items()}
        if isinstance(layer, BudgetLayer):
            entry["row_seen"] = list(layer.row_seen)
            entry["banks"] = []
            for number, bank in enumerate(layer.banks):
                bank.arena.settle()
                entry["banks"].append({"live": bank.arena.live, "capacity": bank.arena.capacity})
                stored = _stored(bank)
                tensors |= {f"{index}.{number}.{name}": tensor for name, tensor in stored.items()}
            if layer.ring is not None:
                entry["next"] = layer.ring.next
                tensors[f"{index}.queries"] = layer.ring.queries
                tensors[f"{index}.query_positions"] = layer.ring.positions
        elif isinstance(layer, WindowLayer) and layer.is_initialized:
            tensors |= {f"{index}.keys": layer.keys, f"{index}.values": layer.values}
        layers.append(entry)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {
        "format": FORMAT,
        "policy": str(cache.policy),
        "budget": asdict(cache.budget),
        "positions": cache.numbering,
        "store": cache.store.name,
        "shape": cache.shape.to_json(),
        "weights": cache.weights,
        "batch": cache.batch_size,
        "layers": layers,
        "capacities": cache.plan.capacities,
        "streaming": cache.plan.streaming,
        "notes": cache.notes,
    }
    if cache.shared.scorer is not None:
        header["regression"] = cache.shared.scorer.regression.checksum
    header["checksum"] = _checksum(header, tensors)
    tensors = tensors or {"empty": torch.zeros(1)}
    try:
        with whole_file(path) as part:
            save_file(tensors, part, metadata={_KEY: json.dumps(header)})
    except (OSError, SafetensorError) as error:
        raise SnapshotError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def load(cls: type[C], path: Path, model: PreTrainedModel) -> C:
    """Read a cache back for its model."""
    model = unwrap(model)
    header, tensors = _read(path)
    try:
        if header["format"] == 1:
            header |= {"positions": "original", "store": "model"}
        how = {key: header[key] for key in ("positions", "store")}
        budget = Budget(**header["budget"])
        # First of all: what a policy lacks in another model's place is not what is wrong.
        _check_model(path, header, Shape.of(model).to_json(), weight_checksums(model))
        cache = cls(model, header["policy"], budget, _slots=header["capacities"], **how)
        if header["capacities"] != cache.plan.capacities or header["streaming"] != cache.plan.streaming:
            raise SnapshotError(
                f"{path} was saved with other slots per head: use the same head scores as then"
            )
        scorer = cache.shared.scorer
        if scorer is not None and header["regression"] != scorer.regression.checksum:
            raise SnapshotError(
                f"{path} holds token scores of another calibration than the model has now: prefill the text "
                "again"
            )
        if header["batch"]:
            _fill(cache, header, tensors, execution_device(model))
        cache.notes = dict(header.get("notes", {}))
    except SnapshotError:
        raise
    except ModicumError as error:
        raise SnapshotError(f"{path} cannot be restored here: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise SnapshotError(f"{path} is corrupted: its header does not fit its contents ({error})") from error
    try:
        cache.check_integrity()
    except CacheError as error:
        raise SnapshotError(f"{path} is corrupted: {error}") from error
    return cache


def _check_model(path: Path, header: dict[str, Any], have: dict[str, Any], weights: Checksums) -> None:
    """Raise unless the file was saved with the model of this shape, and with the weights that it has now."""
    wanted = header["shape"]
    for key, what in (
        ("model_type", "model type"),
        ("layers", "attention layers"),
        ("dtype", "dtype"),
        ("fingerprint", "embeddings"),
    ):
        # An embedding checksum of 0 says that the embeddings could not be read (offloaded to disk).
        if wanted[key] != have[key] and not (key == "fingerprint" and 0 in (wanted[key], have[key])):
            shown = f" ({wanted[key]}, this one {have[key]})" if key in ("model_type", "dtype") else ""
            raise SnapshotError(
                f"{path} was saved with another model: its {what} differ{shown}; load that model"
            )
    name = None if header["format"] < 3 else difference(header["weights"], weights)
    if name is not None:
        index, matrix = name.split(".", 1)
        raise SnapshotError(
            f"{path} was saved with other weights: {matrix} of decoder layer {index} differs, as after "
            "pruning, merging an adapter or training. Load the weights of that time, or prefill the text"
        )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise SnapshotError(f"there is no saved cache at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise SnapshotError(f"{path} holds tensors, but no cache saved by modicum")
            header = json.loads(text)
            if not isinstance(header, dict) or not isinstance(header.get("format"), int):
                raise SnapshotError(f"{path} is corrupted: its header has no format number")
            if header["format"] > FORMAT:
                raise SnapshotError(
                    f"{path} has format {header['format']}, this version reads up to {FORMAT}: "
                    "upgrade modicum"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys() if name != "empty"}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SnapshotError(
            f"{path} is truncated or corrupted, or no saved cache at all ({error})"
        ) from error
    checksum = header.pop("checksum", None)
    if _checksum(header, tensors) != checksum:
        raise SnapshotError(f"{path} is corrupted: its contents do not match their checksum")
    return header, tensors


def _fill(
    cache: BudgetCache, header: dict[str, Any], tensors: dict[str, Tensor], device: torch.device
) -> None:
    dtype = cache.shape.dtype
    for index, (layer, entry) in enumerate(zip(cache.layers, header["layers"], strict=True)):
        states = layer if isinstance(layer, RecurrentLayer) else getattr(layer, "states", None)
        if states is not None:
            states.load_state_dict({name: tensors[f"{index}.{name}"].to(device) for name in entry["states"]})
        if isinstance(layer, WindowLayer):
            keys, values = tensors[f"{index}.keys"].to(device), tensors[f"{index}.values"].to(device)
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values, layer.cumulative_length = keys, values, entry["seen"]
            cache.shared.change(layer.kv_nbytes)
        if not isinstance(layer, BudgetLayer):
            continue
        shape = layer.shape
        empty = (header["batch"], shape.kv_heads, 0)
        layer.lazy_initialization(
            torch.empty(*empty, shape.key_dim, dtype=dtype, device=device),
            torch.empty(*empty, shape.value_dim, dtype=dtype, device=device),
        )
        layer.seen, layer.row_seen = entry["seen"], tuple(entry["row_seen"])
        for number, (bank, kept) in enumerate(zip(layer.banks, entry["banks"], strict=True)):
            if kept["capacity"] != bank.arena.capacity:
                before = bank.nbytes
                bank.arena = bank.arena.resized(kept["capacity"])
                cache.shared.now += bank.nbytes - before
            stored = _stored(bank)
            for name, tensor in stored.items():
                tensor.copy_(tensors[f"{index}.{number}.{name}"])
            bank.arena.live = list(kept["live"])
        if layer.ring is not None:
            layer.ring.next = entry["next"]
            layer.ring.queries.copy_(tensors[f"{index}.queries"])
            layer.ring.positions.copy_(tensors[f"{index}.query_positions"])
    cache.shared.peak = cache.shared.now


def _stored(bank: Bank) -> dict[str, Tensor]:
    """What a bank holds, by name."""
    tally = {"tally": bank.arena.tally} if bank.arena.tally.shape[-1] else {}
    return dict(bank.arena.tensors) | tally | ({} if bank.virtual is None else bank.virtual.tensors)


def _checksum(header: dict[str, Any], tensors: dict[str, Tensor]) -> int:
    """CRC-32 of all that a file says, the names, types and shapes of its tensors included."""
    total = zlib.crc32(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.view(-1).view(torch.uint8).numpy().tobytes(), total)
    return total
