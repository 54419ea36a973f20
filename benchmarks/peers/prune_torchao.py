"""torchao's Wanda, in its own environment.

It ranks a layer's weights together, by dense inputs, and by |W| times the squared norm of the input, where
the paper has the norm.
"""

from __future__ import annotations

from typing import Any

import torch
from prune_peer import linears, main
from torchao.sparsity import WandaSparsifier


@torch.no_grad()
def prune(model: Any, ids: torch.Tensor, method: str, amount: str) -> None:
    """By `WandaSparsifier`, as its documentation has it: prepare, calibrate, step, squash."""
    if method != "wanda":
        raise SystemExit(f"torchao has no {method}")
    grouped = ":" in amount
    sparsifier = WandaSparsifier(
        sparsity_level=0.5 if grouped else float(amount),
        semi_structured_block_size=int(amount.split(":")[1]) if grouped else None,
    )
    sparsifier.prepare(model, config=[{"tensor_fqn": f"{name}.weight"} for name, _ in linears(model)])
    for row in ids:
        model(row[None])
    sparsifier.step()
    sparsifier.squash_mask()


if __name__ == "__main__":
    main(prune)
