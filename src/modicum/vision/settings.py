"""Settings of a search for an image network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from modicum.errors import InputError
from modicum.measure.runtimes import Runtime
from modicum.search.blockwise import BlockwiseSettings
from modicum.search.predictor import MIN_SAMPLES
from modicum.search.space import ReferenceBlock, Variant
from modicum.vision.conv import CONV_SPACES, ConvSpaceSettings
from modicum.vision.recipe import ImageRecipe
from modicum.vision.reference import ReferenceSettings
from modicum.vision.transformer import TRANSFORMER_SPACES, TransformerSpaceSettings

Method = Literal["milp", "nsga2"]


@dataclass(frozen=True)
class VisionSearchSettings:
    """How an image network is searched.

    Attributes:
        reference: the network that is searched around.
        recipe: how the reference is trained.
        space: the variants of each block, or their name: tiny, small, medium or full (see `CONV_SPACES` and
            `TRANSFORMER_SPACES`).
        with_reference_blocks: whether a block may stay the reference's own.
        variants_per_block: how many are trained, drawn at random; the errors of the others are predicted.
            None for all.
        blockwise: how variants are trained.
        samples: networks that are finetuned to fit the predictor; 15 or more are advised.
        sample_epochs: of each of them.
        winners: networks of the front that are finetuned at the end.
        winner_epochs: of each of them.
        finetune_rate: the highest learning rate of samples and winners.
        method: "milp" for the exact front, "nsga2" for evolution.
        front_points: of the front at most, with milp.
        runtime: what runs the network on this machine.
        table: block times of another device; None to measure here.
        validation: share of the images on which networks are compared.
        test_share: share that is kept for the end, where no test images are given.
        most_images: of a class at most; None for all.
        seed: of splits, draws and weights.

    Raises:
        InputError: a value is out of range.
    """

    reference: ReferenceSettings = field(default_factory=ReferenceSettings)
    recipe: ImageRecipe = field(default_factory=ImageRecipe)
    space: str | ConvSpaceSettings | TransformerSpaceSettings = "small"
    with_reference_blocks: bool = True
    variants_per_block: int | None = None
    blockwise: BlockwiseSettings = field(default_factory=BlockwiseSettings)
    samples: int = 20
    sample_epochs: int = 2
    winners: int = 3
    winner_epochs: int = 10
    finetune_rate: float = 2e-3
    method: Method = "milp"
    front_points: int = 24
    runtime: Runtime = field(default_factory=Runtime)
    table: Path | None = None
    validation: float = 0.15
    test_share: float = 0.15
    most_images: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.space, str) and self.space not in self._spaces:
            raise InputError(f"the space is {self.space!r}: give one of {', '.join(self._spaces)}")
        if self.samples < MIN_SAMPLES:
            raise InputError(f"there are {self.samples} samples: give at least {MIN_SAMPLES}, better 15")
        for name, least in (("sample_epochs", 1), ("winners", 1), ("winner_epochs", 1), ("front_points", 2)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}: give {least} or more")
        if not 0 <= self.seed < 2**63:  # what torch's generators take
            raise InputError(f"seed is {self.seed}: give a whole number from 0 to {2**63 - 1:,}")
        if self.method not in ("milp", "nsga2"):
            raise InputError(f"the method is {self.method!r}: give milp or nsga2")
        if self.variants_per_block is not None and self.variants_per_block < MIN_SAMPLES:
            raise InputError(
                f"variants_per_block is {self.variants_per_block}: give at least {MIN_SAMPLES}, from which "
                "the errors of the others are predicted"
            )
        for name in ("validation", "test_share"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give a share between 0 and 1")
        self.finetuning(1)  # checks the rate

    @property
    def _spaces(self) -> Mapping[str, ConvSpaceSettings | TransformerSpaceSettings]:
        return TRANSFORMER_SPACES if self.reference.kind == "vit" else CONV_SPACES

    def variants(self) -> list[Variant]:
        """Of each block."""
        own: list[Variant] = [ReferenceBlock()] if self.with_reference_blocks else []
        space = self._spaces[self.space] if isinstance(self.space, str) else self.space
        return own + list(space.variants())

    def finetuning(self, epochs: int) -> ImageRecipe:
        """How samples and winners are trained."""
        return replace(self.recipe, epochs=epochs, learning_rate=self.finetune_rate, seed=self.seed)


def digest_of(*basis: Any) -> str:
    """16 digits of a digest of settings (dataclasses) and other values."""
    told = [asdict(one) if hasattr(one, "__dataclass_fields__") else one for one in basis]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]
