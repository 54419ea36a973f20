"""Part: the attention's weights or the other weights of a decoder block, which are chosen together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from modicum.weights import packed
from modicum.weights.blocks import Block, Matrix

Kind = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Part:
    """Weights [out, d] of one decoder block that have one option.

    Puzzle (arXiv 2411.19146) chooses attention and feed-forward blocks apart, which takes m + n
    measurements of a layer in place of m · n.
    """

    layer: int
    kind: Kind
    matrices: tuple[Matrix, ...]

    @property
    def name(self) -> str:
        """Such as "3.attention"."""
        return f"{self.layer}.{self.kind}"


def parts_of(blocks: list[Block]) -> list[Part]:
    """The parts of all blocks, in order; a block whose weights are all of one kind has one part."""
    found = []
    for layer, block in enumerate(blocks):
        attention = tuple(matrix for matrix in block.matrices if matrix.of_attention)
        rest = tuple(matrix for matrix in block.matrices if not matrix.of_attention)
        kinds: list[tuple[Kind, tuple[Matrix, ...]]] = [("attention", attention), ("mlp", rest)]
        found += [Part(layer, kind, matrices) for kind, matrices in kinds if matrices]
    return found


def is_held_packed(model: PreTrainedModel, matrix: Matrix) -> bool:
    """Whether a run can hold the weight packed: a linear layer's, not a slice of a parameter of experts."""
    if matrix.name.endswith("]"):
        return False
    modules: nn.Module = model
    return type(modules.get_submodule(matrix.name.removesuffix(".weight"))) is nn.Linear


def held_nbytes(rows: int, width: int, kept: int, itemsize: int) -> int:
    """Bytes in memory of a packed weight: a bit per weight, the values kept, and where each row starts."""
    return packed.bits_and_values(rows, width, kept, itemsize) + 8 * (rows + 1)


def model_nbytes(model: nn.Module) -> int:
    """Bytes of a live model's weights and buffers, each storage once, packed layers as they are held."""
    seen: dict[int, int] = {}
    total = 0
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    for module in model.modules():
        if isinstance(module, packed.PackedLinear):
            total += module.starts_nbytes
    return total + sum(seen.values())


def itemsize_of(values: torch.Tensor) -> int:
    """Bytes of each kept value in memory, as `modicum.weights.packed` stores it."""
    return min(packed.narrow(values).itemsize, values.itemsize)
