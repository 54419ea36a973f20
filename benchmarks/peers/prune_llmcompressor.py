"""llm-compressor's Wanda and SparseGPT, in its own environment. SparseGPT ranks all rows together."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from prune_peer import main


def prune(model: Any, ids: torch.Tensor, method: str, amount: str) -> None:
    """By `oneshot` and the modifier, block by block."""
    modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
    shape = {"mask_structure": amount, "sparsity": 0.5} if ":" in amount else {"sparsity": float(amount)}
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=modifier(targets=["Linear"], ignore=["re:.*lm_head"], **shape),
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
        pipeline="sequential",
        log_dir=None,
    )


if __name__ == "__main__":
    main(prune)
