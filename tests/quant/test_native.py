"""Compiled kernels: every instruction set gives the integers of plain convolution, and torch's floats."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from modicum.errors import InputError
from modicum.quant import (
    ConvSettings,
    DirectInt8,
    ExactWinograd,
    IntegerConv1d,
    QuantConv1d,
    RangeLimitedWinograd,
    RangeSettings,
    RSQWinograd,
    calibrate,
    native,
)
from modicum.quant.native import NativeConv, NativeKernels, native_kernels
from modicum.quant.schemes import Scheme
from tests.quant import reference
from tests.quant.samples import integers, kernels_or_skip, laplace


@pytest.fixture(scope="module")
def kernels() -> list[NativeKernels]:
    return kernels_or_skip().variants()


def sums_of(native_conv: NativeConv, x: Tensor) -> Tensor:
    """int8 [C, T] -> int32 [K, T_out]."""
    length = native_conv.conv.out_length(x.shape[-1])
    result = torch.full((length, native_conv.filters), 7, dtype=torch.int32)
    native_conv.of_rows(x.T.contiguous(), result, None, None)
    return result.T


sizes = st.tuples(st.integers(1, 20), st.integers(1, 70), st.integers(1, 70))


@given(
    sizes=sizes,
    taps=st.integers(1, 5),
    padding=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_direct_sums(
    kernels: list[NativeKernels],
    sizes: tuple[int, int, int],
    taps: int,
    padding: tuple[int, int],
    stride: int,
    dilation: int,
    seed: int,
) -> None:
    length, channels, filters = sizes
    conv = ConvSettings(taps, padding, stride, dilation)
    length = max(length, dilation * (taps - 1) + 1)
    generator = torch.Generator().manual_seed(seed)
    x, weight = integers(generator, 127, channels, length), integers(generator, 127, filters, channels, taps)
    scheme = DirectInt8()
    expected = scheme.sums(x[None].double(), weight.double(), conv, conv.out_length(length))[0]
    for variant in kernels:
        found = sums_of(NativeConv(weight, conv, "direct", 127, variant), x)
        assert torch.equal(found, expected.int()), variant.name


def test_direct_sums_are_those_of_the_loops(kernels: list[NativeKernels]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = integers(generator, 127, 6, 15), integers(generator, 127, 3, 6, 3)
    expected = reference.convolve(x.tolist(), weight.tolist(), (2, 1))
    for variant in kernels:
        found = sums_of(NativeConv(weight, ConvSettings(3, (2, 1)), "direct", 127, variant), x)
        assert found.tolist() == expected


@given(sizes=sizes, padding=st.tuples(st.integers(0, 6), st.integers(0, 6)), seed=st.integers(0, 2**31))
def test_winograd_sums_of_whole_filters_are_direct_convolution(
    kernels: list[NativeKernels], sizes: tuple[int, int, int], padding: tuple[int, int], seed: int
) -> None:
    length, channels, filters = max(sizes[0], 3), *sizes[1:]
    conv = ConvSettings(3, padding)
    generator = torch.Generator().manual_seed(seed)
    x, weight = integers(generator, 63, channels, length), integers(generator, 42, filters, channels, 3)
    transformed = (2 * RangeLimitedWinograd().prepare_weight(weight.double())).to(torch.int8)
    expected = DirectInt8().sums(x[None].double(), weight.double(), conv, 0)[0].int()
    for variant in kernels:
        found = sums_of(NativeConv(transformed, conv, "winograd", 63, variant), x)
        assert torch.equal(found, 2 * expected), variant.name


@given(sizes=sizes, padding=st.tuples(st.integers(0, 6), st.integers(0, 6)), seed=st.integers(0, 2**31))
def test_winograd_sums_with_clipping_are_those_of_torch(
    kernels: list[NativeKernels], sizes: tuple[int, int, int], padding: tuple[int, int], seed: int
) -> None:
    length, channels, filters = max(sizes[0], 3), *sizes[1:]
    conv, scheme = ConvSettings(3, padding), RSQWinograd(alpha=3.0)
    generator = torch.Generator().manual_seed(seed)
    x, filters_ = integers(generator, 127, channels, length), integers(generator, 127, 4, filters, channels)
    expected = scheme.sums(x[None].double(), filters_.double(), conv, conv.out_length(length))[0]
    for variant in kernels:
        found = sums_of(NativeConv(filters_, conv, "winograd", 127, variant), x)
        assert torch.equal(found, expected.int()), variant.name


@pytest.mark.parametrize("kind", ["direct", "winograd"])
def test_the_largest_products_do_not_overflow(
    kernels: list[NativeKernels], kind: Literal["direct", "winograd"]
) -> None:
    """All inputs and weights at their limits: instructions that saturate 16-bit sums would show here."""
    channels, filters, length = 200, 33, 9
    for sign in (1, -1):
        if kind == "direct":
            x = torch.full((channels, length), 127, dtype=torch.int8)
            weight = torch.full((filters, channels, 3), 127 * sign, dtype=torch.int8)
            expected = torch.full((filters, length - 2), 3 * channels * 127 * 127 * sign, dtype=torch.int32)
        else:
            # d = (-64, -64, -64, …) gives V = (0, -128, 0, 0).
            x = torch.full((channels, length), -64, dtype=torch.int8)
            weight = torch.full((4, filters, channels), 127 * sign, dtype=torch.int8)
            expected = torch.full((filters, length - 2), -128 * 127 * channels * sign, dtype=torch.int32)
        for variant in kernels:
            found = sums_of(NativeConv(weight, ConvSettings(3), kind, 127, variant), x)
            assert torch.equal(found, expected), variant.name


@pytest.mark.parametrize("kind", ["direct", "winograd"])
@pytest.mark.parametrize("length", [191, 192, 193, 400])
def test_sequences_longer_than_a_block(
    kernels: list[NativeKernels], kind: Literal["direct", "winograd"], length: int
) -> None:
    generator = torch.Generator().manual_seed(length)
    x = integers(generator, 63, 3, length)
    conv = ConvSettings(3, (1, 1))
    scheme: Scheme = DirectInt8() if kind == "direct" else RangeLimitedWinograd()
    weight = integers(generator, 127, *((5, 3, 3) if kind == "direct" else (4, 5, 3)))
    expected = scheme.sums(x[None].double(), weight.double(), conv, length)[0].int()
    for variant in kernels:
        assert torch.equal(sums_of(NativeConv(weight, conv, kind, 63, variant), x), expected), variant.name


@given(
    channels=st.integers(1, 40),
    length=st.integers(1, 40),
    limit=st.sampled_from([1, 63, 127]),
    is_transposed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_activations_are_rounded_as_in_torch(
    kernels: list[NativeKernels], channels: int, length: int, limit: int, is_transposed: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(channels, length, generator=generator)
    x[0, 0] = 2.5  # times 1: a half, to the nearest even
    if is_transposed:
        x = x.T.contiguous().T
    for inverse in (1.0, 0.37, 50.0):
        expected = (x * torch.tensor(inverse)).clamp(-limit, limit).round().to(torch.int8).T
        for variant in kernels:
            assert torch.equal(variant.quantize(x, inverse, limit), expected), variant.name


def test_slices_of_activations(kernels: list[NativeKernels]) -> None:
    x = torch.randn(12, 50, generator=torch.Generator().manual_seed(0))[::2, ::3]
    for variant in kernels:
        assert torch.equal(variant.quantize(x, 20.0, 127), (20 * x).clamp(-127, 127).round().to(torch.int8).T)


def layer_of(scheme: Scheme, has_bias: bool = True) -> tuple[IntegerConv1d, Tensor]:
    generator = torch.Generator().manual_seed(3)
    conv = nn.Conv1d(21, 35, 3, padding=1, bias=has_bias)
    x = laplace(generator, 3, 21, 57)
    quant = QuantConv1d.of(conv, scheme, RangeSettings(input="max"))
    calibrate(quant, [x])
    return quant.convert(), x


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("scheme", [DirectInt8(), RangeLimitedWinograd(), RSQWinograd(alpha=1.9)])
def test_layers_give_torchs_numbers_bit_for_bit(scheme: Scheme, has_bias: bool) -> None:
    kernels_or_skip()
    layer, x = layer_of(scheme, has_bias)
    layer.backend = "native"
    sums, outputs = layer.sums(x), layer(x)
    layer.backend = "torch"
    assert torch.equal(sums, layer.sums(x))
    assert torch.equal(outputs, layer(x))
    # And for an input that lies in memory as a layer's output does.
    layer.backend = "native"
    assert torch.equal(layer(x.mT.contiguous().mT), outputs)


def test_loaded_weights_are_packed_anew() -> None:
    kernels_or_skip()
    layer, x = layer_of(DirectInt8())
    before = layer.sums(x)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state["weights"] = -state["weights"]
    layer.load_state_dict(state)
    assert torch.equal(layer.sums(x), -before)


def test_kernels_that_cannot_be_used_say_why() -> None:
    kernels_or_skip()
    layer, x = layer_of(ExactWinograd())
    layer.backend = "native"
    with pytest.raises(InputError, match=r'there is none for exact F\(2,3\); use backend "auto" or "torch"'):
        layer(x)
    layer, x = layer_of(DirectInt8())
    layer.backend = "native"
    with pytest.raises(InputError, match=r"they take float32 on a CPU, not torch\.float64"):
        layer.double()(x)
    layer.backend = "fast"  # type: ignore[assignment]
    with pytest.raises(InputError, match="choose one of auto, native, torch"):
        layer(x)


def test_a_sequence_that_is_too_short() -> None:
    layer, x = layer_of(RSQWinograd())
    layer.conv = ConvSettings(3)
    with pytest.raises(InputError, match=r"the sequence has 2 steps .* give a longer one"):
        layer(x[..., :2])


def test_without_a_compiler_torch_is_used_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    native_kernels.cache_clear()
    try:
        layer, x = layer_of(RSQWinograd())
        with pytest.warns(UserWarning, match="install a C\\+\\+ compiler and ninja") as told:
            outputs = layer(x)
        assert len(told) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer(x)
        layer.backend = "torch"
        assert torch.equal(layer(x), outputs)
        layer.backend = "native"
        with pytest.raises(InputError, match="they are not built"):
            layer(x)
    finally:
        native_kernels.cache_clear()
    assert not list((tmp_path / "kernels").glob("*"))  # nothing half-built is left


def test_kernels_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODICUM_KERNELS", "0")
    native_kernels.cache_clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert native_kernels() is None
    finally:
        native_kernels.cache_clear()


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "file"))
    native_kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match="the kernels were not built"):
            assert native_kernels() is None
    finally:
        native_kernels.cache_clear()


def test_a_damaged_library_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_or_skip()
    library = native.build()
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path))
    damaged = tmp_path / "kernels" / library.name
    damaged.parent.mkdir()
    for content in (library.read_bytes(), library.read_bytes()[:5000], b""):
        damaged.write_bytes(content)
        if content == library.read_bytes():
            assert native.build() == damaged
        else:
            with monkeypatch.context() as without_compiler:
                without_compiler.setenv("PATH", "")  # it would be built: tried, and not loaded
                native_kernels.cache_clear()
                with pytest.warns(UserWarning, match="the kernels were not built"):
                    assert native_kernels() is None
            assert not damaged.exists()
    native_kernels.cache_clear()


def test_another_compiler_is_another_build(monkeypatch: pytest.MonkeyPatch) -> None:
    before = native.digest()
    monkeypatch.setenv("CXX", "another-compiler")
    assert native.digest() != before


def test_onnxruntime_gives_the_same_direct_sums() -> None:
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    generator = torch.Generator().manual_seed(4)
    x, weight = integers(generator, 127, 6, 40), integers(generator, 127, 9, 6, 3)
    node = helper.make_node(
        "ConvInteger", ["x", "w", "zero"], ["y"], kernel_shape=[3], pads=[2, 1], strides=[2]
    )
    zero = torch.tensor(128, dtype=torch.uint8).numpy()
    graph = helper.make_graph(
        [node],
        "conv",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 6, 40])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, None)],
        [numpy_helper.from_array(weight.numpy(), "w"), numpy_helper.from_array(zero, "zero")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": (x.int() + 128).to(torch.uint8)[None].numpy()})
    conv = ConvSettings(3, (2, 1), stride=2)
    for variant in kernels_or_skip().variants():
        found = sums_of(NativeConv(weight, conv, "direct", 127, variant), x)
        assert torch.equal(found, torch.from_numpy(expected)[0]), variant.name
