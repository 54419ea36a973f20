"""Float32 products: what is computed in 32 bits, what is left as it is, and how far results are off."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import modicum
from modicum import float32_products as module
from modicum.float32_products import MIN_ROWS, Float32Products, float32_products, has_units
from tests.bounds import assert_within, attention_bound, dot_bound, gamma, logit_bound
from tests.tiny_model import TINY_MODEL

DTYPES = (torch.bfloat16, torch.float16)


class Calls(TorchFunctionMode):
    """Notes the dtypes in which products are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in (F.linear, torch.matmul, F.scaled_dot_product_attention):
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def computed_in(dtype: torch.dtype, rows: int, device: str = "cpu") -> torch.dtype:
    """The dtype of a linear layer's product within the mode of bfloat16."""
    calls = Calls()
    with calls, Float32Products(torch.bfloat16):  # the inner mode sees a call first
        F.linear(
            torch.zeros(rows, 4, dtype=dtype, device=device), torch.zeros(3, 4, dtype=dtype, device=device)
        )
    return calls.dtypes[-1]


def linear_in_float64(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float64)
    for row in range(x.shape[0]):
        for column in range(weight.shape[0]):
            total = 0.0 if bias is None else float(bias[column])
            for k in range(x.shape[1]):
                total += float(x[row, k]) * float(weight[column, k])
            out[row, column] = total
    return out


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(MIN_ROWS, MIN_ROWS + 5),
    width=st.integers(1, 12),
    outputs=st.integers(1, 9),
    has_bias=st.booleans(),
    most=st.sampled_from([1, 7, 2**22]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_a_linear_layer_is_that_of_float64_rounded_once(
    rows: int, width: int, outputs: int, has_bias: bool, most: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, width).to(dtype), torch.randn(outputs, width).to(dtype)
    bias = torch.randn(outputs).to(dtype) if has_bias else None
    with pytest.MonkeyPatch.context() as patch, Float32Products(dtype):
        patch.setattr(module, "_MAX_WEIGHTS", most)  # in one part, and in several
        found = F.linear(x, weight, bias)
    expected = linear_in_float64(x, weight, bias)
    size = x.double().norm(dim=-1)[:, None] * weight.double().norm(dim=-1) + (0 if bias is None else 10)
    rounding = gamma(1, dtype) * (expected.abs() + 1e-6) + torch.finfo(dtype).smallest_normal
    assert found.dtype == dtype
    assert_within(found, expected, dot_bound(width + 1, torch.float32, size, 1.0) * 1.01 + rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["function", "with the log-sum-exp"])
def test_attention_is_that_of_float64_rounded_once(dtype: torch.dtype, form: str) -> None:
    torch.manual_seed(0)
    query, keys, values = (torch.randn(1, 2, n, 8).to(dtype) for n in (MIN_ROWS, 40, 40))
    bias = torch.zeros(1, 1, MIN_ROWS, 40, dtype=dtype)
    bias[..., -3:] = -math.inf
    with Float32Products(dtype):
        if form == "function":
            found = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=0.3)
        else:
            found, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, keys, values, 0.0, False, attn_mask=bias, scale=0.3
            )
    logits = query.double() @ keys.double().mT * 0.3 + bias.double()
    expected = logits.softmax(-1) @ values.double()
    error = logit_bound(torch.float32, query, keys, 0.3)
    bound = attention_bound(40, torch.float32, error, float(values.abs().max()), stored=torch.float32)
    assert found.dtype == dtype
    assert_within(found, expected, bound + gamma(1, dtype) * (expected.abs() + bound))


def test_matrix_products_are_converted_too() -> None:
    a, b = torch.randn(2, MIN_ROWS, 30).bfloat16(), torch.randn(2, 30, 5).bfloat16()
    with Float32Products(torch.bfloat16):
        found = [a @ b, torch.matmul(a, b), a.matmul(b), torch.bmm(a, b)]
    expected = (a.float() @ b.float()).bfloat16()
    for each in found:
        torch.testing.assert_close(each, expected, rtol=0.008, atol=1e-6)  # one rounding of bfloat16
        assert each.dtype == torch.bfloat16


def test_only_many_rows_of_the_dtype_are_converted() -> None:
    assert computed_in(torch.bfloat16, MIN_ROWS) == torch.float32
    assert computed_in(torch.bfloat16, MIN_ROWS - 1) == torch.bfloat16
    assert computed_in(torch.float16, MIN_ROWS) == torch.float16
    assert computed_in(torch.float32, MIN_ROWS) == torch.float32
    assert computed_in(torch.bfloat16, MIN_ROWS, "meta") == torch.bfloat16


def test_rows_of_a_batch_count_together() -> None:
    calls = Calls()
    with calls, Float32Products(torch.bfloat16):
        F.linear(torch.zeros(MIN_ROWS, 1, 4).bfloat16(), torch.zeros(3, 4).bfloat16())
    assert calls.dtypes == [torch.float32]


@pytest.mark.parametrize("supported", [True, False])
def test_nothing_changes_where_the_processor_has_units(
    supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert has_units(torch.bfloat16) is supported
    assert has_units(torch.float32)
    calls = Calls()
    with calls, float32_products(torch.bfloat16):
        F.linear(torch.zeros(MIN_ROWS, 4).bfloat16(), torch.zeros(3, 4).bfloat16())
    assert calls.dtypes == [torch.bfloat16 if supported else torch.float32]
    with float32_products(torch.float32):
        assert F.linear(torch.zeros(MIN_ROWS, 4), torch.zeros(3, 4)).dtype == torch.float32


@pytest.mark.parametrize("supported", [True, False])
def test_a_prompt_is_read_in_float32_and_the_answer_in_16_bits(
    supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "has_units", lambda dtype: supported)
    model, tokenizer = modicum.load(TINY_MODEL, dtype="bfloat16")
    calls = Calls()
    with calls:
        answer = modicum.generate(
            model, tokenizer, "The red boat " * 12, budget=24, chunk=16, n_sink=2, recent=4, max_new_tokens=3
        )
    assert answer.cache.full_nbytes == answer.seen * model.config.num_hidden_layers * 2 * (
        2 * model.config.num_key_value_heads * model.config.head_dim
    )  # of 2 bytes each
    assert (torch.float32 in calls.dtypes) is not supported
    assert torch.bfloat16 in calls.dtypes


def test_gradients_flow() -> None:
    weight = torch.randn(3, 4).bfloat16().requires_grad_()
    with Float32Products(torch.bfloat16):
        F.linear(torch.ones(MIN_ROWS, 4).bfloat16(), weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full((3, 4), float(MIN_ROWS)).bfloat16())
