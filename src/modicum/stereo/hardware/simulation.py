"""Simulation of the core in Amaranth's own simulator, pixel by pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from modicum.errors import InputError
from modicum.packages import import_package
from modicum.stereo.hardware.settings import HardwareSettings


def simulate(
    settings: HardwareSettings,
    frames: list[tuple[NDArray[Any], NDArray[Any]]],
    waiting: tuple[float, float] = (0.0, 0.0),
    seed: int = 0,
) -> tuple[list[NDArray[np.int64]], int]:
    """Disparities [H, W] of frames, and the clocks that they took. About 1,000 clocks a second.

    Args:
        frames: left and right image of each, in the size of the core.
        waiting: how often the input has no pixel, and the output is not ready: shares of the clocks.
        seed: of the waiting.

    Raises:
        InputError: amaranth is not installed, or a frame is of another size.
    """
    import_package("amaranth", "hdl")
    from amaranth.sim import Simulator

    from modicum.stereo.hardware.core import StereoCore

    shape = (settings.height, settings.width)
    for pair in frames:
        for image in pair:
            if image.shape != shape or image.min() < 0 or image.max() >= 2**settings.intensity_bits:
                raise InputError(
                    f"a frame is {list(image.shape)} with values up to {image.max()}: the core is for "
                    f"{list(shape)} and {settings.intensity_bits} bits"
                )
    core = StereoCore(settings)
    pixels = [(int(a), int(b)) for one, two in frames for a, b in zip(one.flat, two.flat, strict=True)]
    found: list[int] = []
    clocks = 0
    draw = np.random.default_rng(seed)

    async def bench(context: Any) -> None:
        nonlocal clocks
        sent = 0
        while len(found) < len(pixels):
            has_pixel = sent < len(pixels) and draw.random() >= waiting[0]
            context.set(core.in_valid, int(has_pixel))
            left, right = pixels[min(sent, len(pixels) - 1)]
            context.set(core.left, left)
            context.set(core.right, right)
            context.set(core.out_ready, int(draw.random() >= waiting[1]))
            if context.get(core.out_valid) and context.get(core.out_ready):
                found.append(context.get(core.disparity))
            sent += int(has_pixel and context.get(core.in_ready))
            clocks += 1
            await context.tick()

    simulator = Simulator(core)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    images = np.array(found, dtype=np.int64).reshape(len(frames), *shape)
    return list(images), clocks
