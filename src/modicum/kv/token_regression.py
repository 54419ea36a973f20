"""TokenRegression: a token's score in each KV head, predicted linearly from its keys, values and their norms.

The score is the calibration's: the largest contribution that the token makes when the text is read again
(KVzip+, Kim et al. 2025, arXiv 2505.23416). What it is predicted from, and that it is predicted, is ours.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from modicum.errors import InputError, ModelError
from modicum.kv.layer_shape import LayerShape
from modicum.kv.turning import Turning

RIDGE = 1e-3
"""λ, in mean diagonals of the Gram matrix of the features less their means."""
_WEIGHT, _INTERCEPT = "regression.weight", "regression.intercept"
_MOST_NBYTES = 2 * 2**30  # of all layers' sums in memory


def features(keys: Tensor, values: Tensor) -> Tensor:
    """What a token's score is predicted from: keys [B, H, m, Dk], values [B, H, m, Dv] ->
    [B, m, H·(Dk+Dv+2)], the keys of all heads, the values of all heads, the L2 norm of each key, and of each
    value.
    """
    parts = [x.transpose(1, 2).flatten(2) for x in (keys, values)]
    norms = [x.norm(dim=-1).transpose(1, 2) for x in (keys, values)]
    return torch.cat([*parts, *norms], dim=-1)


def num_features(shape: LayerShape) -> int:
    """F of a layer: the length of `features`."""
    return shape.kv_heads * (shape.key_dim + shape.value_dim + 2)


def sums_nbytes(layers: Sequence[LayerShape]) -> int:
    """Bytes of the sums of which the regressions of all layers are made (`RegressionSums`)."""
    sizes = [num_features(shape) + 1 for shape in layers if shape.is_full and why_none(shape) is None]
    return sum(8 * size * size for size in sizes)


def too_large(layers: Sequence[LayerShape]) -> str:
    """Why a calibration makes no regression for a model of these layers; "" if it does."""
    size = sums_nbytes(layers)
    if size <= _MOST_NBYTES:
        return ""
    return (
        f"This model's layers have too many KV heads for one: its sums take {size / 2**30:.1f} GiB, and a "
        f"calibration takes {_MOST_NBYTES // 2**30} at most. Use another policy"
    )


def why_none(shape: LayerShape) -> str | None:
    """Why a layer under the budget can have no regression; None if it can."""
    if shape.is_latent:
        return "it keeps latents, from which keys and values are expanded"
    return None


@dataclass(frozen=True, eq=False)
class TokenRegression:
    """log(score + 1e-6) ≈ x W + c, per layer, x the token's `features`.

    Raises:
        InputError: tensors that do not fit each other, or that hold no numbers.
    """

    weights: Mapping[int, Tensor]
    """Layer -> W [F, H], half precision."""
    intercepts: Mapping[int, Tensor]
    """Layer -> c [H], fp32."""
    is_unrotated: bool
    """Whether x has keys as they are before the rotary embedding; else as they are cached."""
    _wide: dict[tuple[tuple[int, ...], torch.device, torch.dtype], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.weights.keys() != self.intercepts.keys():
            raise InputError("token regression: not every layer has weights and intercepts")
        for layer, weight in self.weights.items():
            intercept = self.intercepts[layer]
            if weight.dim() != 2 or intercept.shape != weight.shape[1:]:
                raise InputError(f"token regression: the tensors of layer {layer} do not fit each other")
            if not (bool(weight.isfinite().all()) and bool(intercept.isfinite().all())):
                raise InputError(f"token regression: layer {layer} holds numbers that are not finite")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenRegression):
            return NotImplemented
        pairs = ((self.weights, other.weights), (self.intercepts, other.intercepts))
        return self.is_unrotated == other.is_unrotated and all(
            a.keys() == b.keys() and all(torch.equal(a[i], b[i]) for i in a) for a, b in pairs
        )

    __hash__ = None  # type: ignore[assignment]  # compared by its numbers

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], is_unrotated: bool) -> Self:
        """From tensors by name, see `tensors`.

        Raises:
            InputError: they are not those of a regression.
        """
        parts: dict[str, dict[int, Tensor]] = {_WEIGHT: {}, _INTERCEPT: {}}
        for name, tensor in tensors.items():
            kind, _, layer = name.rpartition(".")
            if kind not in parts or not layer.isdecimal():
                raise InputError(f"token regression: there is no place for a tensor {name!r}")
            parts[kind][int(layer)] = tensor
        return cls(parts[_WEIGHT], parts[_INTERCEPT], bool(is_unrotated))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, for a file."""
        parts = {_WEIGHT: self.weights, _INTERCEPT: self.intercepts}
        return {f"{kind}.{i}": x.contiguous() for kind, part in parts.items() for i, x in part.items()}

    @property
    def checksum(self) -> int:
        """CRC-32 of all its numbers."""
        total = int(self.is_unrotated)
        for name, tensor in sorted(self.tensors.items()):
            total = zlib.crc32(name.encode(), total)
            total = zlib.crc32(tensor.view(torch.uint8).numpy().tobytes(), total)
        return total

    def check(self, layers: Sequence[LayerShape], name: str) -> None:
        """Raise unless there is a fitting map for every layer under the budget of a model of this class name.

        Raises:
            ModelError: there is none; says for which layer and why.
        """
        for i, shape in enumerate(layers):
            if not shape.is_full:
                continue
            reason = why_none(shape)
            wanted = (num_features(shape), shape.kv_heads)
            if reason is None and i not in self.weights:
                reason = "the calibration has none"
            elif reason is None and tuple(self.weights[i].shape) != wanted:
                reason = f"the calibration has one of shape {tuple(self.weights[i].shape)} and not {wanted}"
            if reason is not None:
                raise ModelError(f"layer {i} of {name} has no regression of token scores: {reason}")

    def on(self, layers: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """W [L, F, H] and c [L, 1, H] of some layers of one shape, on a device; made once."""
        known = self._wide.get((layers, device, dtype))
        if known is None:
            with torch.inference_mode(False):
                weight = torch.stack([self.weights[layer] for layer in layers])
                intercept = torch.stack([self.intercepts[layer] for layer in layers]).unsqueeze(1)
                known = weight.to(device, dtype), intercept.to(device, dtype)
            self._wide[layers, device, dtype] = known
        return known


class TokenScorer:
    """Scores new tokens of one cache by the regression of its model.

    Args:
        regression: of the model.
        turning: with which keys are turned back; None where they are taken as they are cached.
    """

    def __init__(self, regression: TokenRegression, turning: Turning | None) -> None:
        self.regression, self.turning = regression, turning

    def twin(self) -> TokenScorer:
        """For a copy of the cache, which may be read in another thread."""
        turning = self.turning
        return TokenScorer(self.regression, turning and Turning(turning.rotary, turning.dtype))

    def forget(self) -> None:
        """Let what was made for a call go."""
        if self.turning is not None:
            self.turning.forget()

    def scores(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor | None) -> Tensor:
        """log(score + 1e-6) as predicted: keys [B, H, m, Dk], values [B, H, m, Dv] -> [B, H, m] fp32.

        positions [B|1, m]: where the model has turned the keys; None for keys that are not turned.
        """
        return self.scores_of((layer,), [keys], [values], positions)[0]

    def scores_of(
        self,
        layers: tuple[int, ...],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        positions: Tensor | None,
    ) -> Tensor:
        """The same tokens in several layers of one shape, in one go -> [L, B, H, m] fp32."""
        count, (b, h, m) = len(layers), keys[0].shape[:3]
        wide = torch.promote_types(keys[0].dtype, torch.float32)
        # [L·B, H, m, D]: layers are further rows.
        k, v = (
            torch.cat(list(parts)).to(wide) if count > 1 else parts[0].to(wide) for parts in (keys, values)
        )
        if self.turning is not None and positions is not None:
            if count > 1 and len(positions) > 1:
                positions = positions.repeat(count, 1)
            k = self.turning.back(k, positions)
        weight, intercept = self.regression.on(layers, k.device, wide)
        found = torch.baddbmm(intercept, features(k, v).view(count, b * m, -1), weight)
        return found.view(count, b, m, h).transpose(2, 3).float()
