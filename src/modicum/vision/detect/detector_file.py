"""Detector file: a safetensors file whose metadata is the record of the architecture, as JSON.

Nothing in it is executed: the network is built from the record, and every tensor must have the shape that the
record says. Weights are float32, or, in a file of `quantized_detector`, int8 with a float32 scale for each
output channel.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from modicum.errors import InputError, ModelError
from modicum.vision.detect.detector import Detector
from modicum.vision.detect.ssd import SSD
from modicum.vision.detect.ssd_settings import SSDSettings
from modicum.whole_file import write_whole

FORMAT = 1
_KEY = "modicum"
_KIND = "detector"


def file_bytes(network: SSD, about: Mapping[str, Any]) -> bytes:
    """The contents of a float detector's file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    return packed(network.settings, tensors, about)


def packed(settings: SSDSettings, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """The contents of a file with such a record and tensors."""
    record = {"format": FORMAT, "kind": _KIND, "settings": settings.to_dict(), "about": dict(about)}
    counted = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    return save(counted, metadata={_KEY: json.dumps(record)})


def save_detector(detector: Detector, path: Path) -> int:
    """Write a file, whole or not at all; its bytes.

    Raises:
        ModelError: it cannot be written.
    """
    data = file_bytes(detector.network, detector.about)
    write_file(path, data)
    return len(data)


def write_file(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all; folders are made.

    Raises:
        ModelError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    except OSError as error:
        raise ModelError(
            f"cannot write {path}: {error.strerror or error}; give another place, or make room"
        ) from error


def load_detector(path: str | Path) -> Detector:
    """A detector from its file; an int8 one (see `quantization`) with its layers quantised.

    Raises:
        InputError: there is no such file.
        ModelError: it is no detector, of a newer format, damaged, or its tensors are of another
            architecture.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no detector {path}: give a file that modicum detect train or prune wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read as a safetensors file ({error}): give a file that modicum detect "
            "train or prune wrote"
        ) from error
    settings, about = _record(path, metadata)
    network = SSD(settings)
    if "quantized" in about:
        from modicum.vision.detect.quantization import fill_quantized

        fill_quantized(network, tensors, path)
    else:
        fill(network, tensors, path)
    return Detector(network.eval(), about)


def fill(network: SSD, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Put a file's tensors into the network of its record.

    Raises:
        ModelError: a tensor is missing, not known, or has another shape or dtype; it is named.
    """
    wanted = {
        name: tensor
        for name, tensor in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    odd = sorted(wanted.keys() ^ tensors.keys())
    if odd:
        raise ModelError(
            f"{path} is of another architecture than its record says: the tensor {odd[0]} is "
            f"{'missing' if odd[0] in wanted else 'not part of it'}; write the file again"
        )
    for name, tensor in wanted.items():
        found = tensors[name]
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise ModelError(
                f"{path} is of another architecture than its record says: {name} has the shape "
                f"{list(found.shape)} and dtype {found.dtype}, its record {list(tensor.shape)} and "
                f"{tensor.dtype}; write the file again"
            )
        if found.is_floating_point() and not bool(found.isfinite().all()):
            raise ModelError(f"{path} holds values of {name} that are not finite: train the detector again")
    network.load_state_dict(dict(tensors), strict=False)


def check_shapes(network: SSD) -> None:
    """Raise unless every tensor of a network has the shape that its record says.

    Raises:
        ModelError: one has not; it is named.
    """
    with torch.device("meta"):
        wanted = SSD(network.settings).state_dict()
    found = network.state_dict()
    for name in sorted(wanted.keys() | found.keys()):
        ours = list(found[name].shape) if name in found else None
        told = list(wanted[name].shape) if name in wanted else None
        if ours != told:
            raise ModelError(f"the tensor {name} has the shape {ours} and its record says {told}")


def _record(path: Path, metadata: Mapping[str, str]) -> tuple[SSDSettings, dict[str, Any]]:
    try:
        record: Any = json.loads(metadata[_KEY])
        if record.get("kind") != _KIND:
            raise ModelError(f"{path} is no detector but a file of the kind {record.get('kind')!r}")
        if record["format"] != FORMAT:
            raise ModelError(
                f"{path} has format {record['format']}, this modicum reads {FORMAT}: get a newer modicum"
            )
        return SSDSettings.from_dict(record["settings"]), dict(record["about"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, ModelError):
            told = str(error)
            raise ModelError(told if told.startswith(str(path)) else f"{path}: {told}") from error
        raise ModelError(
            f"{path} has no record of a detector ({error}): give a file that modicum detect train or prune "
            "wrote"
        ) from error
