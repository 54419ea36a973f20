"""Runtimes: what runs a block when its latency is measured."""

from __future__ import annotations

import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modicum.errors import InputError, ModelError
from modicum.packages import import_lone_package

RuntimeName = Literal["torch", "onnxruntime", "onnxruntime-int8"]
RUNTIMES: tuple[RuntimeName, ...] = ("torch", "onnxruntime", "onnxruntime-int8")
OPSET = 17


@dataclass(frozen=True)
class Runtime:
    """What runs a block.

    Attributes:
        name: "torch" (eager), "onnxruntime" (float32), or "onnxruntime-int8" (static quantisation, made up
            ranges: times are right, results are not).
        threads: of one call.
        batch: inputs of one call.

    Raises:
        InputError: the name is not known, or a number is below 1.
    """

    name: RuntimeName = "torch"
    threads: int = 1
    batch: int = 1

    def __post_init__(self) -> None:
        if self.name not in RUNTIMES:
            raise InputError(f"the runtime is {self.name!r}: give one of {', '.join(RUNTIMES)}")
        for name in ("threads", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give 1 or more")

    def check_packages(self) -> None:
        """Raise if a package is missing that runs or exports blocks.

        Raises:
            InputError: it is not installed.
        """
        if self.name != "torch":
            _package("onnx")
            _package("onnxruntime")

    @contextmanager
    def active(self) -> Iterator[None]:
        """torch with this number of threads, and as it was afterwards."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def prepare(self, module: nn.Module, shape: Sequence[int]) -> Callable[[], object]:
        """A callable that runs a module once on fixed random inputs [batch, *shape].

        Raises:
            InputError: a package is missing.
            ModelError: the module cannot be exported.
        """
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(self.batch, *shape, generator=generator)
        module = module.eval()
        if self.name == "torch":
            return lambda: _run_torch(module, inputs)
        data = onnx_bytes(module, inputs)
        if self.name == "onnxruntime-int8":
            data = _quantized(data, inputs)
        session = _session(data, self.threads)
        feed = {"x": inputs.numpy()}
        return lambda: session.run(None, feed)


@torch.inference_mode()
def _run_torch(module: nn.Module, inputs: Tensor) -> object:
    return module(inputs)


def onnx_bytes(module: nn.Module, inputs: Tensor) -> bytes:
    """An ONNX file of a module: input x, output y, both of fixed shapes.

    Raises:
        InputError: the package onnx is missing.
        ModelError: torch cannot export it.
    """
    _package("onnx")
    try:
        with (
            tempfile.TemporaryDirectory(prefix="modicum-onnx-") as folder,
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            path = Path(folder) / "block.onnx"
            # The older exporter: it takes a tenth of the other's time for a small block.
            torch.onnx.export(
                module,
                (inputs,),
                os.fspath(path),
                dynamo=False,
                opset_version=OPSET,
                input_names=["x"],
                output_names=["y"],
            )
            return path.read_bytes()
    except Exception as error:  # it raises many kinds
        raise ModelError(f"a block cannot be exported to ONNX: {error}") from error


def _session(data: bytes, threads: int) -> Any:
    onnxruntime = _package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _quantized(data: bytes, inputs: Tensor) -> bytes:
    """The file with int8 weights and activations; ranges from random inputs."""
    quantization = _package("onnxruntime.quantization")
    feeds = iter([{"x": inputs.numpy()}])

    reader = type(
        "Reader", (quantization.CalibrationDataReader,), {"get_next": lambda self: next(feeds, None)}
    )()
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory(prefix="modicum-int8-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
            source.write_bytes(data)
            quantization.quantize_static(os.fspath(source), os.fspath(target), reader, per_channel=True)
            return target.read_bytes()
    finally:
        logging.root.setLevel(level)


def _package(name: str) -> Any:
    return import_lone_package(name, "this runtime", ", or give the runtime torch")
