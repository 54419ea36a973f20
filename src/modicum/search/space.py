"""Search space: the variants that each block of a reference network may be replaced by."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modicum.errors import InputError, ModelError
from modicum.search.network import BlockNetwork

Shape = tuple[int, ...]


@dataclass(frozen=True)
class BlockSite:
    """Where a block stands: what it is given and what it must give, of one input.

    Attributes:
        number: of the block.
        input_shape: without the batch: [C, H, W] of images, [N, D] of tokens.
        output_shape: likewise.
    """

    number: int
    input_shape: Shape
    output_shape: Shape

    @property
    def key(self) -> str:
        """The shapes: "16x32x32-24x16x16"."""
        return "-".join("x".join(map(str, shape)) for shape in (self.input_shape, self.output_shape))


class Variant(ABC):
    """One way to build a block. Subclasses are frozen dataclasses of settings."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Of letters, digits, - and _; tells variants of a block apart, and says how it is built."""

    @abstractmethod
    def build(self, site: BlockSite) -> nn.Module:
        """A block with fresh weights (from torch's global generator).

        Raises:
            InputError: it cannot have the site's shapes.
        """

    @property
    def categories(self) -> dict[str, Any]:
        """The settings, from which the error of an untrained variant is predicted."""
        return asdict(self)  # type: ignore[call-overload,no-any-return]  # subclasses are dataclasses


@dataclass(frozen=True)
class ReferenceBlock(Variant):
    """The reference network's own block, with its weights: it needs no training, and its error is 0."""

    @property
    def name(self) -> str:
        """ "reference"."""
        return "reference"

    def build(self, site: BlockSite) -> nn.Module:
        """Not from a site: `SearchSpace.block` copies the reference's."""
        raise InputError(f"block {site.number} of the reference is copied, not built")


Picks = tuple[int, ...]
"""A network of a space: the number of the variant in each block."""


class SearchSpace:
    """The variants of each block of a reference network, which all fit its shapes.

    Args:
        reference: the network that is searched around.
        example: inputs [1, …] that it takes.
        variants: of each block; the same list for all, or one for each.

    Attributes:
        sites: where each block stands.
        variants: of each block.

    Raises:
        InputError: a block has no variant or two of one name, or a variant's shape does not line up with the
            reference's (the block and the shapes are named).
        ModelError: the reference does not take the example.
    """

    def __init__(
        self,
        reference: BlockNetwork,
        example: Tensor,
        variants: Sequence[Variant] | Sequence[Sequence[Variant]],
    ) -> None:
        self.reference, self.example = reference, example
        self.sites = _sites(reference, example)
        is_flat = all(isinstance(one, Variant) for one in variants)
        each: Iterable[Any] = [variants] * len(self.sites) if is_flat else variants
        self.variants: tuple[tuple[Variant, ...], ...] = tuple(tuple(one) for one in each)
        if len(self.variants) != len(self.sites):
            raise InputError(
                f"there are variants for {len(self.variants)} blocks, and the reference has "
                f"{len(self.sites)}: give a list for each"
            )
        for site, own in zip(self.sites, self.variants, strict=True):
            names = [variant.name for variant in own]
            if not names or len(set(names)) < len(names):
                raise InputError(f"block {site.number} has the variants {names}: give each its own name")
            for variant in own:
                if not isinstance(variant, ReferenceBlock):
                    _check(site, variant)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many variants each block has."""
        return tuple(map(len, self.variants))

    @property
    def num_networks(self) -> int:
        """How many networks there are."""
        return math.prod(self.sizes)

    def block(self, number: int, variant: Variant) -> nn.Module:
        """A fresh block in eval mode; of `ReferenceBlock` a copy."""
        if isinstance(variant, ReferenceBlock):
            return copy.deepcopy(self.reference.blocks[number]).eval()
        return variant.build(self.sites[number]).eval()

    def names(self, picks: Picks) -> tuple[str, ...]:
        """The variants' names of a network."""
        return tuple(own[pick].name for own, pick in zip(self.variants, picks, strict=True))

    def picks(self, names: Sequence[str]) -> Picks:
        """The network of these variants' names.

        Raises:
            InputError: a block has no variant of its name.
        """
        found = []
        for site, own, name in zip(self.sites, self.variants, names, strict=True):
            known = [variant.name for variant in own]
            if name not in known:
                raise InputError(f"block {site.number} has no variant {name!r}: it has {', '.join(known)}")
            found.append(known.index(name))
        return tuple(found)

    def assemble(self, picks: Picks, weights: Mapping[tuple[int, str], Mapping[str, Tensor]]) -> BlockNetwork:
        """A network with the reference's stem and head (copies) and chosen blocks.

        Its batch normalisation still has the statistics of blocks trained in isolation: reset them by
        `modicum.search.batchnorm.reset_statistics` before it is measured.

        Args:
            picks: the variant of each block.
            weights: a state dict for each block number and variant name; variants that have none keep fresh
                weights.
        """
        blocks = []
        for number, pick in enumerate(picks):
            variant = self.variants[number][pick]
            block = self.block(number, variant)
            if (number, variant.name) in weights:
                block.load_state_dict(dict(weights[number, variant.name]))
            blocks.append(block)
        stem, head = copy.deepcopy(self.reference.stem), copy.deepcopy(self.reference.head)
        return BlockNetwork(stem, blocks, head).eval()


@torch.no_grad()
def _sites(reference: BlockNetwork, example: Tensor) -> tuple[BlockSite, ...]:
    was_training = reference.training
    reference.eval()
    try:
        state = reference.stem(example)
        sites = []
        for number, block in enumerate(reference.blocks):
            before, state = state, block(state)
            sites.append(BlockSite(number, tuple(before.shape[1:]), tuple(state.shape[1:])))
        reference.head(state)
    except RuntimeError as error:
        raise ModelError(
            f"the reference does not take an input of the shape {tuple(example.shape)}: {error}"
        ) from error
    finally:
        reference.train(was_training)
    return tuple(sites)


@torch.no_grad()
def _check(site: BlockSite, variant: Variant) -> None:
    wanted = f"block {site.number} must turn {list(site.input_shape)} into {list(site.output_shape)}"
    try:
        # Shapes only: no weights are made.
        with torch.device("meta"):
            found = tuple(variant.build(site).eval()(torch.zeros(1, *site.input_shape)).shape[1:])
    except RuntimeError as error:
        raise InputError(
            f"{wanted}, and the variant {variant.name!r} takes no such input ({error}): leave it out"
        ) from error
    if found != site.output_shape:
        raise InputError(f"{wanted}, and the variant {variant.name!r} gives {list(found)}: leave it out")
