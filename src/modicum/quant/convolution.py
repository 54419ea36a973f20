"""The numbers of a convolution, and how a sequence is cut into Winograd's tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modicum.errors import InputError
from modicum.quant.transform import WinogradTransform, as_tensor


@dataclass(frozen=True)
class ConvSettings:
    """What torch.nn.Conv1d takes beside its weights. Padding is zeros.

    Attributes:
        taps: r, the size of the kernel.
        padding: zeros before and after the sequence.

    Raises:
        InputError: a number is out of range.
    """

    taps: int
    padding: tuple[int, int] = (0, 0)
    stride: int = 1
    dilation: int = 1
    groups: int = 1

    def __post_init__(self) -> None:
        if min(self.taps, self.stride, self.dilation, self.groups) < 1 or min(self.padding) < 0:
            raise InputError(f"{self}: give paddings of at least 0 and other numbers of at least 1")

    @classmethod
    def of(cls, conv: nn.Conv1d) -> Self:
        """Those of a layer.

        Raises:
            InputError: its padding is not zeros.
        """
        (taps,), (stride,), (dilation,) = conv.kernel_size, conv.stride, conv.dilation
        if conv.padding_mode != "zeros":
            raise InputError(f"padding_mode is {conv.padding_mode!r}, and only zeros can be padded with")
        if conv.padding == "same":
            total = dilation * (taps - 1)
            padding = (total // 2, total - total // 2)
        elif conv.padding == "valid":
            padding = (0, 0)
        else:
            padding = (int(conv.padding[0]), int(conv.padding[0]))
        return cls(taps, padding, stride, dilation, conv.groups)

    @property
    def is_plain(self) -> bool:
        """Whether Winograd can compute it: stride, dilation and groups are 1."""
        return self.stride == self.dilation == self.groups == 1

    def out_length(self, length: int) -> int:
        """Outputs for an input of so many steps.

        Raises:
            InputError: there would be none.
        """
        spare = length + sum(self.padding) - self.dilation * (self.taps - 1) - 1
        if length < 1 or spare < 0:
            raise InputError(
                f"the sequence has {length} steps and a padding of {self.padding}, and {self.taps} taps with "
                f"dilation {self.dilation} need {self.dilation * (self.taps - 1) + 1}: give a longer one"
            )
        return spare // self.stride + 1


def as_batch(x: Tensor, channels: int, name: str) -> Tensor:
    """A layer's input as a batch: [N, C, T] as it is, [C, T] as [1, C, T].

    Args:
        channels: C that the layer takes.
        name: of the layer, for errors.

    Raises:
        InputError: it has other dimensions or channels, or is not of real numbers.
    """
    if x.dim() not in (2, 3) or x.shape[-2] != channels:
        raise InputError(
            f"{name} was given an input of shape {list(x.shape)}: give [N, {channels}, T] or [{channels}, T]"
        )
    if not x.is_floating_point():
        raise InputError(f"{name} was given an input of {x.dtype}: give one of a floating dtype")
    return x if x.dim() == 3 else x[None]


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a layer computes: float32 at least, as sums of integers do not fit into float16."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(x: Tensor) -> torch.autocast:
    """A context in which autocast does not make sums of integers narrower."""
    return torch.autocast(x.device.type, enabled=False)


def direct_conv1d(x: Tensor, weight: Tensor, conv: ConvSettings) -> Tensor:
    """Direct convolution: x [N, C, T], weight [K, C / groups, r] -> [N, K, T_out]."""
    conv.out_length(x.shape[-1])
    return F.conv1d(F.pad(x, conv.padding), weight, None, conv.stride, 0, conv.dilation, conv.groups)


def transform_input(x: Tensor, transform: WinogradTransform, conv: ConvSettings) -> Tensor:
    """Bᵀ d of every tile: x [N, C, T] -> V [n, N, C, P], P tiles. The last one is filled up with zeros."""
    return apply_input(input_tiles(x, transform, conv), as_tensor(transform.input, x))


def input_tiles(x: Tensor, transform: WinogradTransform, conv: ConvSettings) -> Tensor:
    """The n inputs of every tile: x [N, C, T] -> [N, C, P, n]."""
    tiles = -(-conv.out_length(x.shape[-1]) // transform.outputs)
    left = conv.padding[0]
    right = tiles * transform.outputs + transform.taps - 1 - left - x.shape[-1]
    # A last step that no output reads is cut off (right < 0: padding was larger than the filter's reach).
    return F.pad(x, (left, right)).unfold(-1, transform.products, transform.outputs)


def apply_input(tiles: Tensor, matrix: Tensor) -> Tensor:
    """Tiles [N, C, P, n] by a matrix [n, n] -> [n, N, C, P]."""
    return (tiles @ matrix.mT).movedim(-1, 0)


def apply_filter(weight: Tensor, matrix: Tensor) -> Tensor:
    """Weights [K, C, r] by a matrix [n, r] -> [n, K, C]."""
    return (weight @ matrix.mT).movedim(-1, 0)


def multiply(filters: Tensor, inputs: Tensor) -> Tensor:
    """Sum over channels: U [n, K, C], V [n, N, C, P] -> M [n, N, K, P]."""
    return filters[:, None] @ inputs


def apply_output(products: Tensor, matrix: Tensor, length: int) -> Tensor:
    """Products [n, N, K, P] by a matrix [m, n] -> the first `length` outputs [N, K, length]."""
    return (products.movedim(0, -1) @ matrix.mT).flatten(-2)[..., :length]


def winograd_conv1d(x: Tensor, weight: Tensor, transform: WinogradTransform, conv: ConvSettings) -> Tensor:
    """The same as `direct_conv1d`, by tiles, in floating point.

    Raises:
        InputError: stride, dilation or groups are not 1, or the taps are not the transform's.
    """
    check_plain(transform, conv)
    filters = apply_filter(weight, as_tensor(transform.filter, x))
    products = multiply(filters, transform_input(x, transform, conv))
    return apply_output(products, as_tensor(transform.output, x), conv.out_length(x.shape[-1]))


def check_plain(transform: WinogradTransform, conv: ConvSettings) -> None:
    """Raise unless the transform can compute the convolution.

    Raises:
        InputError: it cannot.
    """
    if not conv.is_plain or conv.taps != transform.taps:
        raise InputError(
            f"{transform} cannot compute a convolution of {conv.taps} taps, stride {conv.stride}, dilation "
            f"{conv.dilation}, groups {conv.groups}: it takes {transform.taps} taps and 1, 1, 1; use direct"
        )
