"""Value norms: how long values are once the output projection has turned them into hidden states."""

from __future__ import annotations

import torch
from torch import Tensor


def value_norms(values: Tensor, output_weight: Tensor) -> Tensor:
    """‖v W_O‖₂ of values [..., H, n, Dv] for each query head of a KV head: [..., H, G, n], fp32 at least.

    output_weight: [H, G, Dv, hidden], see `modicum.kv.output_weight`.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    # One query head at a time: all of them would take group times hidden numbers a token.
    rows = [
        torch.stack([(own @ part.to(own.dtype)).norm(dim=-1) for part in parts], -2)
        for own, parts in zip(values.unbind(-3), output_weight, strict=True)
    ]
    return torch.stack(rows, -3)
