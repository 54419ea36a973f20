"""IntegerConv1d: a quantised convolution for inference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from modicum.errors import InputError
from modicum.quant.convolution import ConvSettings, as_batch, computing_dtype, without_autocast
from modicum.quant.native import NativeConv, native_kernels
from modicum.quant.schemes import DirectInt8, RangeLimitedWinograd, Scheme
from modicum.quant.schemes.state import restored_scheme, scheme_state
from modicum.quant.transform import KERNEL_TILE

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
        name: of the layer, for errors.
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
        name: str = "a converted layer",
    ) -> None:
        super().__init__()
        self.scheme, self.conv, self.name = scheme, conv, name
        dtype = computing_dtype(scales[0].dtype)
        self.register_buffer("weights", weights.detach().to(torch.int8))
        self.register_buffer("input_scale", scales[0].detach().to(dtype, copy=True))
        self.register_buffer("weight_scale", scales[1].detach().to(dtype, copy=True))
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype, copy=True))
        self.backend: Backend = "auto"
        self._native: _Packed | None = None
        self._leave_inference_mode()

    @property
    def filters(self) -> int:
        """K."""
        return self.weights.shape[self.scheme.channel_axis - 1]

    @property
    def channels(self) -> int:
        """C."""
        return self.weights.shape[self.scheme.channel_axis] * self.conv.groups

    @property
    def num_parameters(self) -> int:
        """Numbers of the convolution that it computes: K · C / groups · r, and K with a bias."""
        weights = self.filters * self.channels // self.conv.groups * self.conv.taps
        return weights if self.bias is None else weights + self.filters

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without what is packed for the kernels, which is made again."""
        return {**self.__dict__, "_native": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch gives it no types
        self._leave_inference_mode()

    def get_extra_state(self) -> Tensor:
        """The scheme, with its α, for the state dict."""
        return scheme_state(self.scheme)

    def set_extra_state(self, state: Tensor) -> None:
        """Take α from a state dict.

        Raises:
            InputError: it was saved with another scheme.
        """
        self.scheme = restored_scheme(state, self.scheme, self.name)
        self._native = None  # it was packed for the range of another α

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, T] -> [N, K, T_out], or [C, T] -> [K, T_out], in the dtype of the input.

        Computed in the dtype of the scales, which is float32 or float64. Infinite values are clipped to the
        range, as large ones are.

        Raises:
            InputError: the shape is another one, the sequence is too short, a value is nan, or the input
                requires gradients (there are none).
        """
        batch = self._batch(x)
        packed = self._packed(batch)
        if packed is not None:
            outputs = packed.conv.outputs(batch, packed.inverse_scale, packed.scale, packed.bias)
        else:
            with without_autocast(x):
                sums = self._sums(batch).to(batch.dtype)
                outputs = self.scheme.finish(sums * self._scale(), self._length(batch))
                outputs = outputs if self.bias is None else outputs + self.bias[:, None]
        outputs = outputs.to(x.dtype)
        return outputs if x.dim() == 3 else outputs[0]

    def sums(self, x: Tensor) -> Tensor:
        """The sums of products, int32: [N, K, T_out]; [n, N, K, P] in `tapwise`. N is 1 for [C, T].

        Raises:
            InputError: as `forward`.
        """
        x = self._batch(x)
        packed = self._packed(x)
        if packed is not None:
            return packed.conv.sums(x, packed.inverse_scale)
        with without_autocast(x):
            return self._sums(x)

    def quantize(self, x: Tensor) -> Tensor:
        """The input as whole numbers, in the dtype in which the layer computes.

        Raises:
            InputError: as `forward`.
        """
        return self._quantize(self._batch(x))

    def _quantize(self, x: Tensor) -> Tensor:
        prepared = self.scheme.prepare_input(x, self.conv)
        if prepared is not x:
            self._check_numbers(prepared)  # a difference of infinite values is none
        limit = self.scheme.input_limit
        return (prepared * self.input_scale.reciprocal()).clamp(-limit, limit).round()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the layer; its scales and its bias stay float32 in a model of float16."""
        names = ("input_scale", "weight_scale", "bias")
        before = {name: self._buffers[name] for name in names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch gives it no types
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != computing_dtype(new.dtype):
                self._buffers[name] = old.to(new.device, computing_dtype(new.dtype))
        self._leave_inference_mode()
        return self

    def _batch(self, x: Tensor) -> Tensor:
        """The input [N, C, T], checked, in the dtype of the scales."""
        batch = as_batch(x, self.channels, self.name)
        if batch.requires_grad and torch.is_grad_enabled():
            raise InputError(
                f"{self.name} is converted to integers and has no gradients, and its input requires them: "
                "call it under torch.no_grad(), or train the quantised model before convert_model"
            )
        self._check_numbers(batch)
        return batch.to(self.input_scale.dtype)

    def _check_numbers(self, x: Tensor) -> None:
        # The sum is the cheaper test; it is nan for infinities of both signs, too.
        if bool(x.sum().isnan()) and bool(x.isnan().any()):
            raise InputError(
                f"{self.name} was given values that are not numbers (nan), which integers cannot hold: look "
                "for the layer or the recording that makes the first of them"
            )

    def _sums(self, x: Tensor) -> Tensor:
        bound = self.scheme.largest_sum(self.conv, self.channels)
        dtype = torch.float32 if bound <= _EXACT_FLOAT32 else torch.float64
        inputs, weights = self._quantize(x).to(dtype), self.weights.to(dtype)
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
        self._leave_inference_mode()
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

    def _leave_inference_mode(self) -> None:
        """Tensors made in inference mode do not count writes and cannot be written to later: replace them."""
        with torch.inference_mode(False):
            for name, buffer in self._buffers.items():
                if buffer is not None and buffer.is_inference():
                    self._buffers[name] = buffer.clone()

    def _why_not_native(self, x: Tensor) -> str | None:
        is_direct = isinstance(self.scheme, DirectInt8) and self.conv.groups == 1
        is_small_tile = isinstance(self.scheme, RangeLimitedWinograd) and (
            (self.scheme.outputs, self.scheme.taps) == KERNEL_TILE
        )
        if not is_direct and not is_small_tile:
            return f"there is none for {self.scheme}" + (" with groups" * (self.conv.groups > 1))
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return f"they take float32 on a CPU, not {x.dtype} on {x.device.type}"
        return None if native_kernels() else "they are not built (see the warning of the build)"
