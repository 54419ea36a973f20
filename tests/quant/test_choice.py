"""The oracle decides which layers use Winograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from torch import nn

from modicum.errors import InputError
from modicum.measure import LatencyOracle, TimingSettings
from modicum.quant import Conv1dShape, DirectInt8, QuantSettings, conv1d_oracle, fastest, quantize_model
from modicum.quant.calibration import quantized_layers


def oracle(folder: Path, seconds: Callable[[str], float]) -> LatencyOracle[Conv1dShape]:
    """Candidates run once, and are said to take so long."""

    def samples(runs: Mapping[str, Callable[[], object]], settings: TimingSettings) -> dict[str, list[float]]:
        for run in runs.values():
            run()
        return {name: [seconds(name)] * settings.rounds for name in runs}

    found = conv1d_oracle()
    found.folder, found.measure_samples = folder, samples
    return found


def model() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 4, 3), nn.Conv1d(4, 4, 3), nn.Conv1d(4, 2, 5))


def test_winograd_is_used_where_it_wins(tmp_path: Path) -> None:
    faster = oracle(tmp_path, lambda name: 1.0 if name == "winograd" else 2.0)
    quant = quantize_model(model(), QuantSettings("rsq"), fastest(50, faster))
    schemes = [layer.scheme.name for layer in quantized_layers(quant).values()]
    assert schemes == ["rsq", "rsq", "direct"]  # no kernel for 5 taps
    assert len(faster.path.read_text().split("channels")) == 3  # two shapes were measured


def test_direct_is_used_where_it_does_not(tmp_path: Path) -> None:
    slower = oracle(tmp_path, lambda name: 1.0)
    quant = quantize_model(model(), QuantSettings("limited"), fastest(50, slower))
    assert all(layer.scheme == DirectInt8() for layer in quantized_layers(quant).values())
    quant = quantize_model(model(), QuantSettings("direct"), fastest(50, slower))
    assert all(layer.scheme == DirectInt8() for layer in quantized_layers(quant).values())


def test_bad_shapes() -> None:
    with pytest.raises(InputError, match="give numbers of at least 1"):
        Conv1dShape(0, 4)
