"""The virtual token: one mean key and mean value that stand for all tokens a streaming head has let go.

RazorAttention (Tang et al., 2024, arXiv 2407.15891, Algorithm 1): with D the tokens let go and N_d their
number, k̂ = (1/N_d) Σ_D k and v̂ = (1/N_d) Σ_D v (keys after RoPE) enter the softmax with weight
N_d·exp(q·k̂): one more slot whose logit is raised by ln N_d. Since exp is convex, that never overstates the
mass that was let go.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fold(
    mean_k: Tensor, mean_v: Tensor, count: Tensor, keys: Tensor, values: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Take tokens into the running means; the order and grouping of calls do not matter.

    mean_k [B, H, Dk] and mean_v [B, H, Dv] fp32, count [B, H]; keys [B, H, n, Dk], values [B, H, n, Dv]; mask
    [B, H, n] bool: which of them fold in (what stands in the others is not looked at). Returns new tensors.
    """
    grown = count + mask.sum(-1).to(count.dtype)
    share = grown.clamp_min(1).to(mean_k.dtype).reciprocal().unsqueeze(-1)  # [B, H, 1]
    return _moved(mean_k, keys, mask, share), _moved(mean_v, values, mask, share), grown


def _moved(mean: Tensor, x: Tensor, mask: Tensor, share: Tensor) -> Tensor:
    # Sums of differences from the mean, not of x: nothing grows with the number of tokens folded so far.
    apart = (x.to(mean.dtype) - mean.unsqueeze(2)).masked_fill(~mask.unsqueeze(-1), 0.0)
    return mean + apart.sum(2) * share


def virtual_logit(
    q: Tensor, mean_k: Tensor, count: Tensor, scaling: float, softcap: float | None = None
) -> Tensor:
    """scaling · q·k̂ (soft-capped where the model does) + ln N_d; -inf where nothing has been folded in.

    q [B, H, M, Dk] (M = query heads of the group × queries), mean_k [B, H, Dk], count [B, H] -> [B, H, M].
    """
    z = (q.to(mean_k.dtype) @ mean_k.unsqueeze(-1)).squeeze(-1) * scaling
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z + count.to(z.dtype).log().unsqueeze(-1)


def merge(out: Tensor, lse: Tensor, mean_v: Tensor, logit: Tensor) -> Tensor:
    """The attention output with the virtual token's share joined in by log-sum-exp.

    out [B, H, M, Dv] and lse [B, H, M]: attention over the tokens held (lse -inf where there are none);
    mean_v [B, H, Dv]; logit [B, H, M] of `virtual_logit`. A logit of -inf leaves `out` as it is, bit for bit.
    """
    wide = mean_v.dtype
    # Neither a token held nor one let go, -inf - -inf, is no share.
    share = torch.sigmoid(logit - lse.to(wide)).nan_to_num_(0.0).unsqueeze(-1)
    mean_v = mean_v.unsqueeze(2)
    # A share of 1 means no other token: what stands in `out` is then not even looked at.
    return torch.where(share == 1.0, mean_v, torch.lerp(out.to(wide), mean_v, share)).to(out.dtype)
