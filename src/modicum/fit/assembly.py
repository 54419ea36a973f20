"""Assembly: a plan's weights put into the model, for good."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from modicum.fit.library import Library
from modicum.fit.weight_option import DENSE
from modicum.weights.blocks import Passes
from modicum.weights.progress import Progress
from modicum.weights.prune import by_parameter
from modicum.weights.walk import gather, prune_matrix


@torch.no_grad()
def from_library(library: Library, options: Mapping[str, str]) -> dict[str, Tensor]:
    """Each part as the library has it; the masks, by the parameters' names."""
    masks: dict[str, Tensor] = {}
    for part in library.parts:
        if options[part.name] != DENSE:
            masks |= library.put(part, options[part.name])
    return by_parameter(masks)


@torch.no_grad()
def in_order(
    library: Library, options: Mapping[str, str], progress: Progress | None = None
) -> dict[str, Tensor]:
    """Each part pruned again on what the pruned layers before it give, as `modicum prune` does; the masks.

    What the layers before have lost is then part of what a layer's kept weights are solved for.
    """
    tell = progress or (lambda *_: None)
    passes = Passes(library.model, library.blocks, library.ids)
    masks: dict[str, Tensor] = {}
    for number, block in enumerate(library.blocks):
        tell("pruning in order", number, len(library.blocks))
        if number:
            passes.hidden = passes.through(number - 1)
        parts = [p for p in library.parts if p.layer == number and options[p.name] != DENSE]
        if not parts:
            continue
        found = gather(passes, number, block, library.plan_of(options[parts[0].name]))
        for part in parts:
            how = library.plan_of(options[part.name])
            for matrix in part.matrices:
                masks[matrix.name] = prune_matrix(matrix, found[matrix.name], how, how.pattern, number)[1]
    tell("pruning in order", len(library.blocks), len(library.blocks))
    return by_parameter(masks)
