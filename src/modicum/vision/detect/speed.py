"""Speed: the median time of one image, from the network's input to detections."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modicum.measure import Spread, TimingSettings, interleaved
from modicum.vision.detect.conv_norm import fold_norms
from modicum.vision.detect.detector import Detector
from modicum.vision.detect.onnx_detector import OnnxDetector

ROUNDS = 51


@dataclass(frozen=True)
class Speed:
    """Seconds of one image: the network alone, and with non-maximum suppression.

    Attributes:
        network: None in onnxruntime, where suppression is part of the graph.
        runtime: what computed it, for people.
    """

    network: Spread | None
    detect: Spread
    num_threads: int
    runtime: str


def runs_of(detector: Detector, image: Tensor) -> Mapping[str, Callable[[], object]]:
    """Callables "network" and "detect" for one input [3, H, W], with norms folded."""
    folded = Detector(copy.deepcopy(detector.network).eval(), detector.about)
    fold_norms(folded.network)
    batch = image[None]

    def network() -> Any:
        with torch.no_grad():
            return folded.network.boxes_and_scores(batch)

    return {"network": network, "detect": lambda: folded.detect_inputs(batch)}


def measure_speed(detector: Detector | OnnxDetector, image: Tensor, rounds: int = ROUNDS) -> Speed:
    """Of an input [3, H, W], with the runtime's number of threads; with one, the thread's own time, which
    leaves out what other processes take.
    """
    if isinstance(detector, Detector):
        runs, num_threads = runs_of(detector, image), torch.get_num_threads()
        is_int8 = "quantized" in detector.about
        runtime = "torch, which computes int8 in float32" if is_int8 else "torch"
    else:
        session = detector
        runs, num_threads = {"detect": lambda: session.detect_inputs(image[None])}, detector.num_threads
        runtime = "onnxruntime"
    clock = time.thread_time if num_threads == 1 else time.perf_counter
    spreads = {k: Spread.of(v) for k, v in interleaved(runs, TimingSettings(rounds, 1e-9), clock).items()}
    return Speed(spreads.get("network"), spreads["detect"], num_threads, runtime)
