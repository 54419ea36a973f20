"""The compiled int8 kernels: built once into the user's cache folder, called through their C interface."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import tempfile
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from modicum.cache_folder import cache_folder
from modicum.errors import InputError
from modicum.progress import reporting
from modicum.quant.convolution import ConvSettings

SOURCES = Path(__file__).parent / "kernels"
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-Wno-uninitialized", "-Wno-maybe-uninitialized")
"""No fused multiply-add: outputs are scaled and shifted by two roundings, as torch does. GCC 12 warns of its
own AVX-512 headers."""
LINE = 64


class ConvTask(ctypes.Structure):
    """ModicumConv of conv1d.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("channels", "filters", "taps")),
        *((name, ctypes.c_int32) for name in ("stride", "dilation", "left_padding")),
        *((name, ctypes.c_int64) for name in ("length", "out_length")),
        *((name, ctypes.c_void_p) for name in ("input", "weights", "sums", "output", "scale", "bias")),
    )


class QuantizeTask(ctypes.Structure):
    """ModicumQuantize of conv1d.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("channels", "length", "channel_step", "time_step")),
        *((name, ctypes.c_void_p) for name in ("input", "output")),
        ("inverse_scale", ctypes.c_float),
        ("limit", ctypes.c_int32),
    )


class NativeKernels:
    """The library and the instruction set in use.

    Args:
        library: the shared library.
        index: of the instruction set; 0 is the best that this processor has.
    """

    def __init__(self, library: ctypes.CDLL, index: int = 0) -> None:
        self.library, self.index = library, index
        library.modicum_name.restype = ctypes.c_char_p
        library.modicum_packed_nbytes.restype = ctypes.c_size_t

    @property
    def name(self) -> str:
        """Of the instruction set: avx512vnni, avx2, neon, neon-dotprod or portable."""
        told: bytes = self.library.modicum_name(self.index)
        return told.decode()

    def variants(self) -> list[NativeKernels]:
        """One for each instruction set that this processor has, best first."""
        return [NativeKernels(self.library, index) for index in range(self.library.modicum_count())]

    def pack(self, weights: Tensor, kind: Literal["direct", "winograd"]) -> Tensor:
        """Weights in the order in which the kernel reads them: bytes that begin at a cache line.

        Args:
            weights: int8 [K, C, r] for direct, [4, K, C] for winograd.
        """
        weights = weights.contiguous()
        is_direct = kind == "direct"
        filters, channels = weights.shape[0 if is_direct else 1], weights.shape[1 if is_direct else 2]
        matrices = weights.shape[2] if is_direct else 4
        nbytes = self.library.modicum_packed_nbytes(self.index, matrices, filters, channels)
        room = torch.empty(nbytes + LINE, dtype=torch.uint8)
        start = -room.data_ptr() % LINE
        packed = room[start : start + nbytes]
        source, target = ctypes.c_void_p(weights.data_ptr()), ctypes.c_void_p(packed.data_ptr())
        if is_direct:
            self.library.modicum_pack_direct(self.index, source, filters, channels, matrices, target)
        else:
            self.library.modicum_pack_winograd(self.index, source, filters, channels, target)
        return packed

    def quantize(self, x: Tensor, inverse_scale: float, limit: int) -> Tensor:
        """x float32 [C, T], any strides, to int8 rows [T, C]: clip(round(x · inverse_scale), ±limit).

        Raises:
            InputError: x is not such a tensor.
        """
        if x.dim() != 2 or x.dtype != torch.float32 or x.device.type != "cpu":
            raise InputError(
                f"the kernels were given {x.dtype} {list(x.shape)} on {x.device}: "
                "give float32 [C, T] on a CPU"
            )
        rows = torch.empty((x.shape[1], x.shape[0]), dtype=torch.int8)
        task = QuantizeTask(
            x.shape[0], x.shape[1], *x.stride(), x.data_ptr(), rows.data_ptr(), inverse_scale, limit
        )
        self.library.modicum_quantize(self.index, ctypes.byref(task))
        return rows

    def run(self, kind: Literal["direct", "winograd"], task: ConvTask) -> None:
        """Compute one convolution.

        Raises:
            MemoryError: there is none for the transformed activations.
        """
        call = self.library.modicum_direct if kind == "direct" else self.library.modicum_winograd
        if call(self.index, ctypes.byref(task)):
            raise MemoryError(f"no memory for a convolution of {task.out_length} steps")


class NativeConv:
    """A convolution with packed weights.

    Args:
        weights: int8, [K, C, r] for direct, [4, K, C] for winograd.
        limit: Q of the input.
        kernels: None: the best that this processor has.
    """

    def __init__(
        self,
        weights: Tensor,
        conv: ConvSettings,
        kind: Literal["direct", "winograd"],
        limit: int,
        kernels: NativeKernels | None = None,
    ) -> None:
        found = kernels or native_kernels()
        assert found is not None
        self.kernels, self.conv, self.kind, self.limit = found, conv, kind, limit
        self.filters, self.channels = weights.shape[:2] if kind == "direct" else weights.shape[1:]
        self.packed = found.pack(weights, kind)

    def sums(self, x: Tensor, inverse_scale: float) -> Tensor:
        """x float32 [N, C, T] to int32 sums [N, K, T_out]."""
        return self._each(x, inverse_scale, torch.int32)

    def outputs(self, x: Tensor, inverse_scale: float, scale: Tensor, bias: Tensor | None) -> Tensor:
        """x float32 [N, C, T] to sums · scale + bias, float32 [N, K, T_out]; its memory is [N, T_out, K].

        Args:
            inverse_scale: one by the input's scale.
            scale: [K], contiguous.
            bias: [K], contiguous, or None.
        """
        return self._each(x, inverse_scale, torch.float32, scale, bias)

    def of_rows(self, rows: Tensor, result: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
        """Convolve int8 rows [T, C]; all tensors are contiguous.

        Args:
            result: [T_out, K]: int32 for sums; float32 for sums · scale + bias.
            scale: [K]; None with int32.
            bias: [K], or None.

        Raises:
            InputError: a shape or a dtype is another one.
        """
        has_scale = scale is not None
        self._check(rows, torch.int8, (rows.shape[0], self.channels))
        length = self.conv.out_length(rows.shape[0])
        self._check(result, torch.float32 if has_scale else torch.int32, (length, self.filters))
        for vector in (scale, bias):
            if vector is not None:
                self._check(vector, torch.float32, (self.filters,))
        task = ConvTask(
            self.channels,
            self.filters,
            self.conv.taps,
            self.conv.stride,
            self.conv.dilation,
            self.conv.padding[0],
            *(rows.shape[0], result.shape[0], rows.data_ptr(), self.packed.data_ptr()),
            None if has_scale else result.data_ptr(),
            result.data_ptr() if has_scale else None,
            None if scale is None else scale.data_ptr(),
            None if bias is None else bias.data_ptr(),
        )
        self.kernels.run(self.kind, task)

    def _each(
        self,
        x: Tensor,
        inverse_scale: float,
        dtype: torch.dtype,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        if x.dim() != 3 or x.shape[1] != self.channels:
            raise InputError(
                f"the input has the shape {list(x.shape)}: give [N, C, T] with {self.channels} channels"
            )
        length = self.conv.out_length(x.shape[-1])
        result = torch.empty((len(x), length, self.filters), dtype=dtype)
        for sequence, out in zip(x.detach().unbind(), result.unbind(), strict=True):
            self.of_rows(self.kernels.quantize(sequence, inverse_scale, self.limit), out, scale, bias)
        return result.mT

    def _check(self, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """The kernels read and write plain memory: nothing else would notice a wrong size."""
        if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
            raise InputError(
                f"the kernels were given {tensor.dtype} {list(tensor.shape)}: give {dtype} {list(shape)}, "
                "contiguous"
            )


@cache
def native_kernels() -> NativeKernels | None:
    """The kernels with the best instruction set of this processor; None, with one warning, without a
    compiler.

    The first call on a machine builds them, in some seconds. MODICUM_KERNELS=0 turns them off.
    """
    if os.environ.get("MODICUM_KERNELS") == "0":
        return None
    try:
        return NativeKernels(ctypes.CDLL(str(build())))
    except (RuntimeError, OSError, ImportError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"int8 convolutions run in torch, with the same numbers but slower: the kernels were not built "
            f"({first}); install a C++ compiler and ninja",
            stacklevel=2,
        )
        return None


def digest() -> str:
    """16 hex digits of sources, flags, compiler and kind of processor: the version of the kernels."""
    found = hashlib.sha256(" ".join((*FLAGS, os.environ.get("CXX", ""), platform.machine())).encode())
    for path in sorted(SOURCES.iterdir()):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def build() -> Path:
    """The shared library, built unless it was.

    It is built in a folder of its own and moved to its place whole, so that no process reads half of it and a
    build that was stopped blocks no other one. Its name ends in a digest of its bytes: a file that was
    damaged since would kill the process, so it is deleted and built again.

    Raises:
        RuntimeError: there is no compiler or no ninja, or it failed.
        OSError: the cache folder cannot be written.
    """
    place = cache_folder() / "kernels"
    name = f"conv1d-{digest()}"
    for library in place.glob(f"{name}-*.so"):
        if library.name == f"{name}-{_content_digest(library)}.so":
            return library
        with suppress(OSError):
            library.unlink()
    from torch.utils import cpp_extension

    place.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=place, prefix="build-"))
    try:
        with reporting(True, 1, "building the int8 kernels, once", "libraries") as tell:
            cpp_extension.load(
                name="modicum_conv1d",
                sources=[str(path) for path in sorted(SOURCES.glob("*.cpp"))],
                extra_cflags=list(FLAGS),
                build_directory=str(folder),
                is_python_module=False,
            )
            tell(1)
        built = folder / "modicum_conv1d.so"
        library = place / f"{name}-{_content_digest(built)}.so"
        built.replace(library)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return library


def _content_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
