"""IntegerConv1d: a quantised convolution for inference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from modicum.errors import InputError
from modicum.quant.convolution import ConvSettings
from modicum.quant.native import NativeConv, native_kernels
from modicum.quant.schemes import DirectInt8, RangeLimitedWinograd, RSQWinograd, Scheme

Backend = Literal["auto", "native", "torch"]
_EXACT_FLOAT32 = 2**24
"""Sums up to here are exact in float32, in any order."""


@dataclass(frozen=True)
class _Packed:
    """A layer as the kernels take it."""

    conv: NativeConv
    inverse_scale: float
    scale: Tensor
    bias: Tensor | None
    buffers: tuple[Tensor | None, ...]
    versions: tuple[int, ...]

    def is_of(self, buffers: tuple[Tensor | None, ...]) -> bool:
        """Whether it was made of these tensors, and none was written to since."""
        is_same = all(one is other for one, other in zip(buffers, self.buffers, strict=True))
        return is_same and versions_of(buffers) == self.versions


def versions_of(buffers: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    """Torch's counts of writes."""
    return tuple(0 if buffer is None else buffer._version for buffer in buffers)


class IntegerConv1d(nn.Module):
    """A convolution with integer weights and one scale for each output channel (and tap, in `tapwise`).

    `native` computes it by the compiled int8 kernels (on a CPU; direct int8 without groups, and F(2, 3) of
    `limited` and `rsq`), `torch` by torch in a floating dtype that holds every sum exactly. Both give the
    same int32 sums, and the same float32 outputs, bit for bit. `auto` takes the kernels where they can be
    used.

    Args:
        weights: whole numbers, as the scheme prepares them.
        scales: of the input and of the weights.
        bias: [K], or None.
    """

    weights: Tensor
    input_scale: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        scheme: Scheme,
        conv: ConvSettings,
        weights: Tensor,
        scales: tuple[Tensor, Tensor],
        bias: Tensor | None,
    ) -> None:
        super().__init__()
        self.scheme, self.conv = scheme, conv
        self.register_buffer("weights", weights.detach().to(torch.int8))
        self.register_buffer("input_scale", scales[0].detach().clone())
        self.register_buffer("weight_scale", scales[1].detach().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.backend: Backend = "auto"
        self._native: _Packed | None = None

    @property
    def filters(self) -> int:
        """K."""
        return self.weights.shape[1 if self.scheme.has_transformed_weights else 0]

    @property
    def channels(self) -> int:
        """C."""
        if self.scheme.has_transformed_weights:
            return self.weights.shape[2]
        return self.weights.shape[1] * self.conv.groups

    @property
    def num_parameters(self) -> int:
        """Numbers of the convolution that it computes: K · C / groups · r, and K with a bias."""
        weights = self.filters * self.channels // self.conv.groups * self.conv.taps
        return weights if self.bias is None else weights + self.filters

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without what is packed for the kernels, which is made again."""
        return {**self.__dict__, "_native": None}

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, T] -> [N, K, T_out], in the dtype of the scales."""
        x = x.to(self.input_scale.dtype)
        packed = self._packed(x)
        if packed is not None:
            return packed.conv.outputs(x, packed.inverse_scale, packed.scale, packed.bias)
        outputs = self.scheme.finish(self._sums(x).to(x.dtype) * self._scale(), self._length(x))
        return outputs if self.bias is None else outputs + self.bias[:, None]

    def sums(self, x: Tensor) -> Tensor:
        """The sums of products, int32: [N, K, T_out]; [n, N, K, P] in `tapwise`."""
        x = x.to(self.input_scale.dtype)
        packed = self._packed(x)
        return self._sums(x) if packed is None else packed.conv.sums(x, packed.inverse_scale)

    def quantize(self, x: Tensor) -> Tensor:
        """The input as whole numbers, in its own dtype."""
        prepared = self.scheme.prepare_input(x, self.conv)
        limit = self.scheme.input_limit
        return (prepared * self.input_scale.reciprocal()).clamp(-limit, limit).round()

    def _sums(self, x: Tensor) -> Tensor:
        bound = self.scheme.largest_sum(self.conv, self.channels)
        dtype = torch.float32 if bound <= _EXACT_FLOAT32 else torch.float64
        inputs, weights = self.quantize(x).to(dtype), self.weights.to(dtype)
        return self.scheme.sums(inputs, weights, self.conv, self._length(x)).to(torch.int32)

    def _scale(self) -> Tensor:
        return self.scheme.output_scale(self.input_scale, self.weight_scale)

    def _length(self, x: Tensor) -> int:
        return self.conv.out_length(x.shape[-1])

    def _packed(self, x: Tensor) -> _Packed | None:
        """What the compiled kernel needs, if it is to be used."""
        if self.backend not in get_args(Backend):
            raise InputError(f"the backend is {self.backend!r}: choose one of {', '.join(get_args(Backend))}")
        if self.backend == "torch":
            return None
        why = self._why_not_native(x)
        if why is not None:
            if self.backend == "native":
                raise InputError(f'the kernels cannot be used: {why}; use backend "auto" or "torch"')
            return None
        # Replaced buffers, and those that load_state_dict wrote to, are packed anew.
        buffers = (self.weights, self.input_scale, self.weight_scale, self.bias)
        if self._native is None or not self._native.is_of(buffers):
            kind: Literal["direct", "winograd"] = "winograd"
            if isinstance(self.scheme, DirectInt8):
                kind = "direct"
            self._native = _Packed(
                NativeConv(self.weights, self.conv, kind, self.scheme.input_limit),
                float(self.input_scale.reciprocal()),
                self._scale().flatten().contiguous(),
                None if self.bias is None else self.bias.contiguous(),
                buffers,
                versions_of(buffers),
            )
        return self._native

    def _why_not_native(self, x: Tensor) -> str | None:
        is_direct = isinstance(self.scheme, DirectInt8) and self.conv.groups == 1
        is_small_tile = isinstance(self.scheme, RangeLimitedWinograd | RSQWinograd) and (
            self.scheme.outputs,
            self.scheme.taps,
        ) == (2, 3)
        if not is_direct and not is_small_tile:
            return f"there is none for {self.scheme}" + (" with groups" * (self.conv.groups > 1))
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return f"they take float32 on a CPU, not {x.dtype} on {x.device.type}"
        return None if native_kernels() else "they are not built (see the warning of the build)"
