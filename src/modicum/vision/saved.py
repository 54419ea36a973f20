"""Saved networks: a folder with weights and what is needed to build and use the network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from modicum.errors import InputError, ModelError
from modicum.search.network import BlockNetwork
from modicum.search.space import ReferenceBlock, SearchSpace, Variant
from modicum.vision.conv import ConvVariant
from modicum.vision.images import ImageSet, read_image
from modicum.vision.reference import ReferenceSettings
from modicum.vision.transformer import TransformerVariant
from modicum.whole_file import whole_file, write_json

FORMAT = 1
CONFIG, WEIGHTS = "network.json", "network.safetensors"
_KINDS: dict[str, type[Variant]] = {
    "reference": ReferenceBlock,
    "conv": ConvVariant,
    "transformer": TransformerVariant,
}


@dataclass(frozen=True)
class Prediction:
    """What a network says of an image: probabilities by class, the largest first."""

    probabilities: dict[str, float]

    @property
    def label(self) -> str:
        """The most probable class."""
        return next(iter(self.probabilities))


@dataclass
class VisionNetwork:
    """A network for images with its classes.

    Attributes:
        network: stem, blocks, head.
        reference: the reference that gives stem, head and the blocks that are its own.
        blocks: how each block is built.
        classes: names, by label.
        mean: [3], of each colour, pixels from 0 to 1.
        deviation: [3].
        about: how it came about.
    """

    network: BlockNetwork
    reference: ReferenceSettings
    blocks: tuple[Variant, ...]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        network: BlockNetwork,
        reference: ReferenceSettings,
        blocks: Sequence[Variant],
        images: ImageSet,
        about: dict[str, Any],
    ) -> VisionNetwork:
        """Of a network that learnt from these images."""
        mean, deviation = tuple(images.mean.tolist()), tuple(images.deviation.tolist())
        return cls(network, reference, tuple(blocks), images.classes, mean, deviation, about)

    def save(self, folder: str | Path) -> None:
        """Write the weights, then the description, without which the folder is no network.

        Raises:
            ModelError: a file cannot be written.
        """
        folder = Path(folder)
        told = {
            "format": FORMAT,
            "reference": self.reference.to_dict(),
            "blocks": [_variant_to_dict(variant) for variant in self.blocks],
            "classes": self.classes,
            "mean": self.mean,
            "deviation": self.deviation,
            "about": self.about,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CONFIG).unlink(missing_ok=True)
            with whole_file(folder / WEIGHTS) as part:
                save_file({k: v.contiguous() for k, v in self.network.state_dict().items()}, part)
            write_json(folder / CONFIG, told)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"cannot write to {folder}: {error}; make room, or give another folder"
            ) from error

    @classmethod
    def load(cls, folder: str | Path) -> VisionNetwork:
        """Read a folder.

        Raises:
            InputError: it is no such folder, or a file is damaged.
        """
        folder = Path(folder)
        try:
            told: Any = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            if told["format"] != FORMAT:
                raise InputError(f"{folder} has the format {told['format']}, and this version reads {FORMAT}")
            reference = ReferenceSettings.from_dict(told["reference"])
            blocks = tuple(_variant_from_dict(one) for one in told["blocks"])
            classes = tuple(map(str, told["classes"]))
            weights = load_file(folder / WEIGHTS)
            network = build_network(reference, blocks, len(classes))
            network.load_state_dict(weights)
            mean, deviation = tuple(map(float, told["mean"])), tuple(map(float, told["deviation"]))
            return cls(network.eval(), reference, blocks, classes, mean, deviation, told["about"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{folder} is no saved network ({type(error).__name__}: {error}): give a folder with "
                f"{CONFIG} and {WEIGHTS}"
            ) from error

    @torch.inference_mode()
    def classify(self, path: str | Path) -> Prediction:
        """The classes of an image file.

        Raises:
            InputError: it cannot be read, or pillow is missing.
        """
        pixels = read_image(path, self.reference.size)
        mean, deviation = torch.tensor(self.mean), torch.tensor(self.deviation)
        empty = ImageSet(pixels[:0], torch.zeros(0, dtype=torch.int64), self.classes, mean, deviation)
        probabilities = self.network(empty.normalized(pixels)).softmax(-1)[0]
        order = probabilities.argsort(descending=True).tolist()
        return Prediction({self.classes[i]: float(probabilities[i]) for i in order})


def build_network(reference: ReferenceSettings, blocks: Sequence[Variant], num_classes: int) -> BlockNetwork:
    """A network of these blocks, with fresh weights (from torch's global generator).

    Raises:
        InputError: a block's shapes do not line up.
    """
    base = reference.build(num_classes)
    space = SearchSpace(base, reference.example, [[variant] for variant in blocks])
    return space.assemble((0,) * len(blocks), {})


def _variant_to_dict(variant: Variant) -> dict[str, Any]:
    kind = next(kind for kind, one in _KINDS.items() if type(variant) is one)
    return {"kind": kind, **asdict(variant)}  # type: ignore[call-overload]  # variants are dataclasses


def _variant_from_dict(told: dict[str, Any]) -> Variant:
    settings = {key: value for key, value in told.items() if key != "kind"}
    return _KINDS[told["kind"]](**settings)
