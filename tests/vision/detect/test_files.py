"""Detector files: what is written comes back, and nothing else is taken for a detector."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modicum.errors import InputError, ModelError
from modicum.vision.detect.detector_file import load_detector, save_detector, write_file
from modicum.vision.detect.quantization import QuantConv2d, quantized_bytes, quantized_detector
from tests.bounds import assert_within
from tests.vision.detect.scenes import random_inputs, tiny_detector

Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]


@pytest.mark.parametrize("backbone", ["resnet14", "mobilenet"])
def test_a_file_gives_the_same_boxes(tmp_path: Path, backbone: str) -> None:
    detector = tiny_detector(backbone)
    path = tmp_path / "deep" / "one.safetensors"
    assert save_detector(detector, path) == path.stat().st_size
    loaded = load_detector(path)
    assert loaded.about == {"made": "by a test"}
    (a,), (b,) = (one.detect_inputs(random_inputs(1)) for one in (detector, loaded))
    assert len(a) > 5
    assert torch.equal(a.boxes, b.boxes)
    assert torch.equal(a.scores, b.scores)
    assert [path.name for path in path.parent.iterdir()] == ["one.safetensors"]


def test_an_int8_file_gives_the_same_boxes_and_is_a_quarter(tmp_path: Path) -> None:
    detector = tiny_detector()
    whole = save_detector(detector, tmp_path / "whole.safetensors")
    small = quantized_detector(detector, [random_inputs(4, seed=1)])
    data = quantized_bytes(small)
    write_file(tmp_path / "small.safetensors", data)
    assert len(data) < 0.45 * whole  # its header, scales and biases are large beside so few weights
    loaded = load_detector(tmp_path / "small.safetensors")
    (a,), (b,) = (one.detect_inputs(random_inputs(1)) for one in (small, loaded))
    assert len(a) > 5
    assert torch.equal(a.boxes, b.boxes)
    assert torch.equal(a.scores, b.scores)
    with pytest.raises(ModelError, match="int8 already"):
        quantized_detector(loaded, [random_inputs(1)])
    with pytest.raises(InputError, match="no image to find ranges"):
        quantized_detector(detector, [])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda r, t: t.pop("heads.0.boxes.bias"),
            "another architecture than its record says: heads.0.boxes",
        ),
        (
            lambda r, t: t.update({"heads.0.boxes.weight": t["heads.0.boxes.weight"].permute(1, 0, 2, 3)}),
            r"heads\.0\.boxes\.weight has the shape .* and dtype torch\.int8, not",
        ),
        (
            lambda r, t: t.update({"heads.0.boxes.weight": t["heads.0.boxes.weight"].float()}),
            r"dtype torch\.float32, not",
        ),
        (lambda r, t: t["heads.0.boxes.weight_scale"].fill_(math.inf), "not finite: quantise it again"),
    ],
)
def test_an_int8_file_of_another_architecture_is_one_line(tmp_path: Path, change: Change, told: str) -> None:
    path = tmp_path / "small.safetensors"
    write_file(path, quantized_bytes(quantized_detector(tiny_detector(), [random_inputs(2)])))
    _rewritten(path, change)
    with pytest.raises(ModelError, match=told):
        load_detector(path)


def test_an_int8_convolution_is_that_of_loops() -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 2, 3, 2, 1)
    layer = QuantConv2d(conv, "max", "the layer")
    x = torch.randn(1, 3, 6, 6)
    layer.input_quant.observe(x)
    found = layer(x)
    step = float(x.abs().max()) / 127
    for k in range(2):
        scale = float(conv.weight[k].detach().abs().max()) / 127
        w = [[[round(float(v) / scale) for v in row] for row in plane] for plane in conv.weight[k].detach()]
        for y in range(3):
            for column in range(3):
                total = 0
                for c in range(3):
                    for dy in range(3):
                        for dx in range(3):
                            row, place = 2 * y + dy - 1, 2 * column + dx - 1
                            if 0 <= row < 6 and 0 <= place < 6:
                                total += w[c][dy][dx] * round(float(x[0, c, row, place]) / step)
                assert conv.bias is not None
                expected = total * scale * step + float(conv.bias[k].detach())
                # float32 sums; rounding of a tie may differ by one step of one of 27 products.
                bound = 1e-5 * (1 + abs(expected)) + 2 * 127 * scale * step
                assert abs(float(found[0, k, y, column]) - expected) <= bound
    outputs = torch.nn.functional.conv2d(x, conv.weight, conv.bias, 2, 1)
    size = float(conv.weight.detach().abs().max() * x.abs().max())
    assert_within(found, outputs, 27 * size * (1 / 127 + 1 / 127**2))


def _rewritten(path: Path, change: Change) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["modicum"])
    tensors = load_file(path)
    change(record, tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"modicum": json.dumps(record)})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda r, t: t.pop("heads.0.boxes.bias"), "tensor heads.0.boxes.bias is missing"),
        (lambda r, t: t.update(more=torch.zeros(1)), "tensor more is not part of it"),
        (lambda r, t: r["settings"]["channels"].update(stage1=24), "another architecture than its record"),
        (lambda r, t: r["settings"]["channels"].pop("stage1"), "'stage1' is missing"),
        (lambda r, t: r["settings"]["backbone"].update(kind="vgg"), "the backbone is 'vgg'"),
        (lambda r, t: r["settings"].update(height=33), "the height of the input is 33"),
        (lambda r, t: r["settings"].update(height=math.inf), "no record of a detector"),
        (lambda r, t: r["settings"].pop("anchors"), "no record of a detector"),
        (lambda r, t: r.update(format=9), "has format 9, this modicum reads 1"),
        (lambda r, t: r.update(kind="recognizer"), "is no detector but a file of the kind 'recognizer'"),
        (lambda r, t: t["heads.0.boxes.bias"].fill_(float("nan")), "not finite"),
        (lambda r, t: t.update({"heads.0.boxes.bias": t["heads.0.boxes.bias"].double()}), "float64"),
    ],
)
def test_a_file_of_another_architecture_is_one_line(tmp_path: Path, change: Change, told: str) -> None:
    path = tmp_path / "one.safetensors"
    save_detector(tiny_detector(), path)
    _rewritten(path, change)
    with pytest.raises(ModelError, match=told) as caught:
        load_detector(path)
    assert str(path) in str(caught.value)


def test_what_is_no_safetensors_file_is_never_unpickled(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "harm",))

    path = tmp_path / "pickled.safetensors"
    path.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ModelError, match="cannot be read as a safetensors file"):
        load_detector(path)
    assert not (tmp_path / "harm").exists()
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match="no record of a detector"):
        load_detector(path)
    with pytest.raises(InputError, match="there is no detector"):
        load_detector(tmp_path / "none.safetensors")


def test_batches_that_find_ranges_count_alike() -> None:
    detector = tiny_detector()
    batches = [factor * random_inputs(2, seed=factor) / 4 for factor in (1, 2, 4)]
    found = [quantized_detector(detector, order) for order in (batches, batches[::-1])]
    first, second = (
        [layer.input_quant.scale for layer in one.network.modules() if isinstance(layer, QuantConv2d)]
        for one in found
    )
    alone = [
        next(layer.input_quant.scale for layer in one.network.modules() if isinstance(layer, QuantConv2d))
        for one in (quantized_detector(detector, [batch]) for batch in batches)
    ]
    # The stem's inputs are the images; later ones are of layers whose own ranges move with each batch.
    torch.testing.assert_close(first[0], torch.stack(alone).mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(first[0], second[0], rtol=1e-6, atol=0)
