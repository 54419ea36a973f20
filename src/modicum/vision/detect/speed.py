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

ROUNDS = 51


@dataclass(frozen=True)
class Speed:
    """Seconds of one image: the network alone, and with non-maximum suppression."""

    network: Spread
    detect: Spread
    num_threads: int


def runs_of(detector: Detector, image: Tensor) -> Mapping[str, Callable[[], object]]:
    """Callables "network" and "detect" for one input [3, H, W], with norms folded."""
    folded = Detector(copy.deepcopy(detector.network).eval(), detector.about)
    fold_norms(folded.network)
    batch = image[None]

    def network() -> Any:
        with torch.no_grad():
            return folded.network.boxes_and_scores(batch)

    return {"network": network, "detect": lambda: folded.detect_inputs(batch)}


def measure_speed(detector: Detector, image: Tensor, rounds: int = ROUNDS) -> Speed:
    """With torch's number of threads; with one, the thread's own time."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    samples = interleaved(runs_of(detector, image), TimingSettings(rounds, 1e-9), clock)
    return Speed(Spread.of(samples["network"]), Spread.of(samples["detect"]), torch.get_num_threads())
