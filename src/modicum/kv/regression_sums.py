"""RegressionSums: what a ridge regression per layer needs, added up over texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from modicum.kv.layer_shape import LayerShape
from modicum.kv.token_regression import RIDGE, TokenRegression, num_features, too_large, why_none


class RegressionSums:
    """Per layer XᵀX and XᵀY over the tokens of texts, in float64, with a column of ones behind X.

    Args:
        layers: of the model. Layers that can have no regression are left out, and all are where their
            sums are too large.
    """

    def __init__(self, layers: Sequence[LayerShape]) -> None:
        self.gram: dict[int, Tensor] = {}
        """Layer -> [F + 1, F + 1]"""
        self.product: dict[int, Tensor] = {}
        """Layer -> [F + 1, H]"""
        if too_large(layers):
            return
        for i, shape in enumerate(layers):
            if shape.is_full and why_none(shape) is None:
                size = num_features(shape) + 1
                self.gram[i] = torch.zeros(size, size, dtype=torch.float64)
                self.product[i] = torch.zeros(size, shape.kv_heads, dtype=torch.float64)

    def add(self, layer: int, x: Tensor, y: Tensor) -> None:
        """Of the tokens of a text: features x [n, F] and targets y [n, H]."""
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        x, y = x.to(wide), y.to(x.device, wide)
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        self.gram[layer] += (x.T @ x).cpu()
        self.product[layer] += (x.T @ y).cpu()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The sums by name, for a file."""
        parts = {"gram": self.gram, "product": self.product}
        return {f"{name}.{i}": x for name, part in parts.items() for i, x in part.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the sums of a file.

        Raises:
            KeyError: some are missing.
            ValueError: some are of another shape.
        """
        found = {name: tensors[name] for name in self.tensors}
        if any(found[name].shape != x.shape for name, x in self.tensors.items()):
            raise ValueError("sums of another model")
        for name, x in self.tensors.items():
            x.copy_(found[name])

    def solve(self, is_unrotated: bool) -> TokenRegression | None:
        """W = (X̄ᵀX̄ + λI)⁻¹ X̄ᵀȲ with X̄ and Ȳ less their means, λ = `RIDGE` · mean of X̄ᵀX̄'s diagonal, and
        c = ȳ - x̄ W of the rounded W; None where no layer has tokens.
        """
        weights, intercepts = {}, {}
        for i, gram in self.gram.items():
            product, count = self.product[i], gram[-1, -1]
            if not count:
                continue
            mean_x, mean_y = gram[-1, :-1] / count, product[-1] / count
            centred = gram[:-1, :-1] - count * torch.outer(mean_x, mean_x)
            ridge = RIDGE * centred.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
            centred.diagonal().add_(ridge)
            weight = torch.linalg.solve(centred, product[:-1] - count * torch.outer(mean_x, mean_y))
            weights[i] = weight.half()
            intercepts[i] = (mean_y - mean_x @ weights[i].double()).float()
        return TokenRegression(weights, intercepts, is_unrotated) if weights else None
