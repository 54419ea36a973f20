"""modicum's ways, as the peers are run: a process of its own, the same tokens."""

from __future__ import annotations

from typing import Any

import torch
from prune_peer import main

import modicum
from modicum.weights.blocks import Passes, blocks_of
from modicum.weights.plan import plan
from modicum.weights.scores import magnitude
from modicum.weights.walk import gather

WAYS: dict[str, dict[str, Any]] = {
    "wanda": {"refine": None},
    "wanda, layer": {"refine": None, "scope": "layer"},
    "sparsegpt": {"method": "sparsegpt", "refine": None},
    "sparsegpt, layer": {"method": "sparsegpt", "refine": None, "scope": "layer"},
    "wanda + swap + lsq": {"refine": "swap", "update": "lsq"},
    "sparsegpt + lsq": {"method": "sparsegpt", "refine": None, "update": "lsq"},
    "alps": {"method": "alps", "refine": None},
}


SQUARED = "wanda squared, layer, dense inputs"


@torch.no_grad()
def as_torchao(model: Any, ids: torch.Tensor, amount: str) -> None:
    """torchao's rule, to have something of the same kind to measure it by: all inputs are looked at before
    any block is pruned, and a weight counts by its input's squared norm, where Wanda has the norm.
    """
    how = plan(refine=None, pattern=amount) if ":" in amount else plan(sparsity=float(amount), scope="layer")
    blocks = blocks_of(model)
    passes = Passes(model, blocks, ids)
    found = []
    for number, block in enumerate(blocks):
        found.append(gather(passes, number, block, how))
        passes.hidden = passes.through(number)
    for inputs, block in zip(found, blocks, strict=True):
        for matrix in block.matrices:
            power = inputs[matrix.name].power.to(matrix.weight.dtype)
            matrix.weight.mul_(how.pattern.select(magnitude(matrix.weight) * power))


def prune(model: Any, ids: torch.Tensor, method: str, amount: str) -> None:
    """By `modicum.prune`."""
    if method == SQUARED:
        as_torchao(model, ids, amount)
        return
    grouped = ":" in amount
    how = {name: value for name, value in WAYS[method].items() if not (grouped and name == "scope")}
    modicum.prune(model, ids, **how, **({"pattern": amount} if grouped else {"sparsity": float(amount)}))


if __name__ == "__main__":
    main(prune)
