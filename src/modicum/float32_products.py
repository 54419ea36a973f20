"""Float32 products: linear layers, matrix products and attention of 16-bit tensors, computed in float32.

A processor without instructions for bfloat16 or float16 takes some eight times as long for a product of many
rows in 16 bits as in 32. Converting the operands first is cheap where a weight serves many rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

MIN_ROWS = 16
"""Of the first operand. With fewer, converting the second one costs more than it saves."""
_MAX_WEIGHTS = 2**22
"""Of a linear layer, that are converted at a time: 16 MiB."""

_ATTENTION_WITH_LSE = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_WHOLE = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, F.scaled_dot_product_attention)
"""Functions whose operands are converted as they are."""


def has_units(dtype: torch.dtype) -> bool:
    """Whether products of a dtype are fast on this processor, as far as torch can tell.

    True for all dtypes but bfloat16 and float16.
    """
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(
        dtype
    )
    check = None if name is None else getattr(torch.ops.mkldnn, name, None)
    return check is None or bool(check())


@contextmanager
def float32_products(dtype: torch.dtype) -> Iterator[None]:
    """Within it, products and attention of tensors of a dtype are computed in float32 on the CPU, where the
    processor has no instructions for that dtype. Results are rounded to the dtype once.

    Only what has at least `MIN_ROWS` rows is converted. It takes 16 MiB more for the time of a linear layer,
    and what the operands of a product or an attention take in float32.

    Args:
        dtype: of the model. Nothing changes where it is not bfloat16 or float16.
    """
    if has_units(dtype):
        yield
        return
    with Float32Products(dtype):
        yield


class Float32Products(TorchFunctionMode):
    """Does so on any processor.

    Args:
        dtype: bfloat16 or float16.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called for each function of torch."""
        more = dict(kwargs or {})
        if func is F.linear:
            if self._is_mine(args[0]) and args[0].numel() >= MIN_ROWS * args[0].shape[-1]:
                return self._linear(*args, **more)
        elif func in _WHOLE:
            if self._has_rows(args[0]):
                return func(*map(self._wide, args), **{k: self._wide(v) for k, v in more.items()}).to(
                    self.dtype
                )
        elif func is _ATTENTION_WITH_LSE and self._has_rows(args[0]):
            out, lse = func(*map(self._wide, args), **{k: self._wide(v) for k, v in more.items()})
            return out.to(self.dtype), lse
        return func(*args, **more)

    def _is_mine(self, first: Tensor) -> bool:
        return first.dtype == self.dtype and first.device.type == "cpu"

    def _has_rows(self, first: Tensor) -> bool:
        return self._is_mine(first) and first.dim() > 1 and first.shape[-2] >= MIN_ROWS

    def _wide(self, value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype == self.dtype else value

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Some outputs at a time."""
        outputs, width = weight.shape
        step = max(1, _MAX_WEIGHTS // width)
        wide = input.float()
        parts = [
            F.linear(
                wide,
                weight[start : start + step].float(),
                None if bias is None else bias[start : start + step].float(),
            ).to(self.dtype)
            for start in range(0, outputs, step)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
