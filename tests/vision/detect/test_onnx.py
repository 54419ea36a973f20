"""ONNX: onnxruntime finds the same boxes."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from modicum.errors import InputError, ModelError
from modicum.vision.detect.detector import Detector
from modicum.vision.detect.nms import NmsSettings
from modicum.vision.detect.onnx_detector import OnnxDetector
from modicum.vision.detect.onnx_export import export_onnx
from modicum.vision.detect.pruning.channel_graph import kept_network
from modicum.vision.detect.quantization import quantized_detector
from tests.bounds import assert_within
from tests.vision.detect.scenes import random_inputs, scene, tiny_detector, tiny_network

pytest.importorskip("onnx", reason="needs onnx, of the extra detect")
pytest.importorskip("onnxscript", reason="needs onnxscript, of the extra detect")
pytest.importorskip("onnxruntime", reason="needs onnxruntime")


def pruned_detector() -> Detector:
    """With some channels of every group gone."""
    network = tiny_network("resnet14", 0.25)
    kept = {name: torch.arange(3, count - 2) for name, count in network.settings.channels.items()}
    return Detector(kept_network(network, kept))


@pytest.mark.parametrize("kind", ["resnet14", "mobilenet", "pruned"])
def test_the_boxes_are_the_same(tmp_path: Path, kind: str) -> None:
    detector = pruned_detector() if kind == "pruned" else tiny_detector(kind)
    path = tmp_path / "one.onnx"
    settings = NmsSettings(0.05, 0.45, 50)
    assert export_onnx(detector, path, settings) == path.stat().st_size
    runtime = OnnxDetector.load(path)
    assert (runtime.classes, runtime.input_size) == (detector.classes, detector.input_size)
    for one in random_inputs(3):
        (a,), (b,) = detector.detect_inputs(one[None], settings), runtime.detect_inputs(one[None])
        assert len(a) == len(b) > 5
        # float32 through about 20 layers in two implementations; boxes are up to 100 pixels.
        assert_within(b.scores, a.scores, 1e-4)
        for box, score, label in zip(a.boxes, a.scores, a.labels, strict=True):
            # Those of nearly the same score may have changed places.
            alike = ((b.scores - score).abs() <= 2e-4) & (b.labels == label)
            assert float((b.boxes[alike] - box).abs().amax(1).min()) <= 1e-2
    image, _ = scene(0)
    few = runtime.detect(image, NmsSettings(0.05, 0.45, 3))
    assert len(few) <= 3


def test_no_detection_is_no_error(tmp_path: Path) -> None:
    detector = tiny_detector()
    export_onnx(detector, tmp_path / "one.onnx", NmsSettings(min_score=1.0))
    (found,) = OnnxDetector.load(tmp_path / "one.onnx").detect_inputs(random_inputs(1))
    assert found.boxes.shape == (0, 4)
    assert len(detector.detect_inputs(random_inputs(1), NmsSettings(min_score=1.0))[0]) == 0


def test_scores_that_the_file_leaves_out_are_told(tmp_path: Path) -> None:
    export_onnx(tiny_detector(), tmp_path / "one.onnx", NmsSettings(min_score=0.3))
    runtime = OnnxDetector.load(tmp_path / "one.onnx")
    with pytest.warns(UserWarning, match=r"gives only those above 0\.3: export it with --min-score 0\.01"):
        runtime.detect_inputs(random_inputs(1), NmsSettings(min_score=0.01))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runtime.detect_inputs(random_inputs(1), NmsSettings(min_score=0.3))
        runtime.detect(scene(0)[0])


def test_int8_runs_in_onnxruntime(tmp_path: Path) -> None:
    detector = quantized_detector(tiny_detector(), [random_inputs(4, seed=1)])
    settings = NmsSettings(0.05, 0.45, 50)
    export_onnx(detector, tmp_path / "int8.onnx", settings)
    import onnx

    graph = onnx.load(tmp_path / "int8.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QuantizeLinear") == kinds.count("Conv") > 10
    assert all(
        tensor.data_type == onnx.TensorProto.INT8
        for tensor in graph.initializer
        if tensor.name.endswith(".int8")
    )
    (a,) = detector.detect_inputs(random_inputs(1), settings)
    (b,) = OnnxDetector.load(tmp_path / "int8.onnx").detect_inputs(random_inputs(1))
    assert abs(len(a) - len(b)) <= 2
    # One rounding that falls the other way moves an input by a step of 1/127 of its range.
    assert_within(b.scores[:5], a.scores[:5], 0.02)


def test_what_is_no_such_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no detector"):
        OnnxDetector.load(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"bad")
    with pytest.raises(ModelError, match=r"bad\.onnx is no detector"):
        OnnxDetector.load(tmp_path / "bad.onnx")
