"""The NEON kernels, compiled by a cross-compiler and run under an emulator, bit for bit."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from modicum.quant import ConvSettings, DirectInt8, RSQWinograd
from modicum.quant.native import SOURCES
from tests.quant.samples import integers

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in (COMPILER, EMULATOR):
        if shutil.which(name) is None:
            pytest.skip(f"needs {name}: apt-get install g++-aarch64-linux-gnu qemu-user")
    out = tmp_path_factory.mktemp("cross") / "driver"
    driver = Path(__file__).parent / "cross_driver.cpp"
    sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
    flags = ["-std=c++17", "-O2", "-static", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([COMPILER, *flags, f"-I{SOURCES}", *sources, str(driver), "-o", str(out)], check=True)
    return out


# Channels, filters, taps, stride, dilation, padding before and after, length.
CASES = [
    (1, 1, 3, 1, 1, 1, 1, 1),
    (7, 9, 3, 1, 1, 0, 0, 20),
    (33, 17, 3, 1, 1, 2, 1, 27),
    (64, 40, 3, 1, 1, 1, 1, 401),
    (5, 3, 5, 2, 3, 4, 0, 40),
]


@pytest.mark.parametrize(
    ("cpu", "names"), [("max", ["neon-dotprod", "neon", "portable"]), ("cortex-a53", ["neon", "portable"])]
)
@pytest.mark.parametrize("case", CASES)
def test_neon_gives_the_same_bits(program: Path, case: tuple[int, ...], cpu: str, names: list[str]) -> None:
    channels, filters, taps, stride, dilation, before, after, length = case
    conv = ConvSettings(taps, (before, after), stride, dilation)
    out, limit, inverse = conv.out_length(length), 127, 0.7
    generator = torch.Generator().manual_seed(length)
    x = 60 * torch.randn(channels, length, generator=generator)
    weight = integers(generator, 127, filters, channels, taps)
    filters_ = integers(generator, 127, 4, filters, channels)
    scale, bias = torch.rand(filters, generator=generator) / 100, torch.randn(filters, generator=generator)
    has_winograd = taps == 3 and conv.is_plain
    header = struct.pack("<9i", channels, filters, taps, stride, dilation, before, length, out, limit)
    sent = [header, struct.pack("<f", inverse), *(y.numpy().tobytes() for y in (x, weight))]
    sent += [filters_.numpy().tobytes()] if has_winograd else []
    sent += [scale.numpy().tobytes(), bias.numpy().tobytes()]
    command = [EMULATOR, "-cpu", cpu, str(program)]
    told = subprocess.run(command, input=b"".join(sent), capture_output=True, check=True, env={**os.environ})

    rows = (x * torch.tensor(inverse)).clamp(-limit, limit).round()
    expected = [rows.to(torch.int8).T]
    for scheme, whole in ((DirectInt8(), weight), (RSQWinograd(alpha=3.0), filters_))[: 1 + has_winograd]:
        sums = scheme.sums(rows[None].double(), whole.double(), conv, out)[0].T.to(torch.int32)
        expected += [sums, sums.float() * scale + bias]
    one = b"".join(np.ascontiguousarray(y.numpy()).tobytes() for y in expected)
    assert told.stdout == b"".join(name.encode().ljust(16, b"\0") + one for name in names)
    assert _is_varied(expected[1])


def _is_varied(sums: Tensor) -> bool:
    return sums.numel() < 2 or len(sums.unique()) > 1
