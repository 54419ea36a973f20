"""Convolutions of others, for benchmarks/winograd.py: onnxruntime and torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Run = Callable[[], object]
ENGINES = ("x86", "onednn", "fbgemm")
"""Of torch's quantised operators. qnnpack, for phones, is many times slower on this kind of processor."""


def version() -> str:
    """onnxruntime's."""
    import onnxruntime

    told: str = onnxruntime.__version__
    return told


def onnxruntime_runs(x: Tensor, weight: Tensor) -> dict[str, Run]:
    """QLinearConv (uint8 by int8, to uint8), ConvInteger (to int32) and fp32 Conv, one thread."""
    from onnx import TensorProto, helper, numpy_helper

    filters, _, taps = weight.shape
    rng = np.random.default_rng(0)
    whole = rng.integers(-127, 128, tuple(weight.shape)).astype(np.int8)
    activations = rng.integers(0, 128, tuple(x.shape)).astype(np.uint8)

    def scalar(name: str, value: float, dtype: type) -> object:
        return numpy_helper.from_array(np.array(value, dtype=dtype), name)

    w = numpy_helper.from_array(whole, "w")
    zero = scalar("x_zero", 0, np.uint8)
    steps = [
        scalar("x_scale", 0.01, np.float32),
        zero,
        w,
        numpy_helper.from_array(np.full(filters, 0.01, np.float32), "w_scale"),
        numpy_helper.from_array(np.zeros(filters, np.int8), "w_zero"),
        scalar("y_scale", 0.1, np.float32),
        scalar("y_zero", 0, np.uint8),
    ]
    attributes = {"kernel_shape": [taps], "pads": [taps // 2, taps // 2]}
    inputs = ["x", "x_scale", "x_zero", "w", "w_scale", "w_zero", "y_scale", "y_zero"]
    byte = TensorProto.UINT8
    nodes = {
        "onnxruntime QLinearConv": (
            helper.make_node("QLinearConv", inputs, ["y"], **attributes),
            (byte, byte),
            steps,
            activations,
        ),
        "onnxruntime ConvInteger": (
            helper.make_node("ConvInteger", ["x", "w", "x_zero"], ["y"], **attributes),
            (byte, TensorProto.INT32),
            [w, zero],
            activations,
        ),
        "onnxruntime fp32": (
            helper.make_node("Conv", ["x", "w"], ["y"], **attributes),
            (TensorProto.FLOAT, TensorProto.FLOAT),
            [numpy_helper.from_array(weight.numpy(), "w")],
            x.numpy(),
        ),
    }
    return {name: _session(*rest) for name, rest in nodes.items()}


def _session(node: object, types: tuple[int, int], weights: list[object], x: np.ndarray) -> Run:
    import onnxruntime
    from onnx import helper

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    values = [helper.make_tensor_value_info(n, t, None) for n, t in zip("xy", types, strict=True)]
    graph = helper.make_graph([node], "conv", values[:1], values[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, {"x": x})


def torch_runs(x: Tensor, weight: Tensor) -> dict[str, Run]:
    """Quantised Conv1d with each engine that runs, and `_int_mm` with inputs that are unfolded already."""
    filters, channels, taps = weight.shape
    found: dict[str, Run] = {}
    quantized = torch.quantize_per_tensor(x, 0.05, 64, torch.quint8)
    scales, zeros = torch.full((filters,), 0.02, dtype=torch.double), torch.zeros(filters, dtype=torch.long)
    kernel = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    for engine in ENGINES:
        try:
            torch.backends.quantized.engine = engine
            packed = torch.ops.quantized.conv1d_prepack(kernel, None, [1], [taps // 2], [1], 1)
            torch.ops.quantized.conv1d(quantized, packed, 0.1, 64)
        except RuntimeError:
            continue  # an engine that this build or processor has not

        def run(engine: str = engine, packed: object = packed) -> Tensor:
            torch.backends.quantized.engine = engine
            told: Tensor = torch.ops.quantized.conv1d(quantized, packed, 0.1, 64)
            return told

        found[f"torch quantised, {engine}"] = run
    generator = torch.Generator().manual_seed(0)
    columns = torch.randint(-127, 128, (x.shape[-1], taps * channels), generator=generator, dtype=torch.int8)
    matrix = torch.randint(-127, 128, (taps * channels, filters), generator=generator, dtype=torch.int8)
    # Columns are contiguous: with overlapping strides torch 2.13 gives wrong sums.
    found["torch _int_mm, unfolded"] = lambda: torch._int_mm(columns, matrix)
    return found
