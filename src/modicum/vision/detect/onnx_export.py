"""ONNX: a detector as a file that onnxruntime runs, non-maximum suppression included.

Input: images [1, 3, H, W] float32, RGB, 0 to 255, letterboxed with grey 114. Outputs by falling score: boxes
[N, 4] float32 (corners in pixels of the input), scores [N] float32, labels [N] int64. The record of the
detector is in the file's metadata under "modicum", so that `OnnxDetector` runs it on whole images. An int8
detector becomes QuantizeLinear and DequantizeLinear around each convolution, which onnxruntime runs in int8.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modicum.errors import InputError
from modicum.vision.detect.conv_norm import fold_norms
from modicum.vision.detect.detector import Detector
from modicum.vision.detect.detector_file import write_file
from modicum.vision.detect.nms import NmsSettings
from modicum.vision.detect.quantization import QuantConv2d, quantized_layers
from modicum.vision.detect.ssd import SSD

OPSET = 18
_INPUT = "images"


def export_onnx(detector: Detector, path: str | Path, settings: NmsSettings | None = None) -> int:
    """Write a file; its bytes.

    Raises:
        InputError: the packages onnx and onnxscript are not installed.
        ModelError: the file cannot be written.
    """
    settings = settings or NmsSettings()
    onnx = _onnx()
    proto = _raw_model(detector)
    if quantized_layers(detector):
        _quantize(onnx, proto, detector)
    _suppress(onnx, proto, settings)
    entry = proto.metadata_props.add()
    entry.key = "modicum"
    told = {
        "settings": detector.network.settings.to_dict(),
        "about": dict(detector.about),
        "min_score": settings.min_score,
    }
    entry.value = json.dumps(told)
    onnx.checker.check_model(proto)
    data: bytes = proto.SerializeToString()
    write_file(Path(path), data)
    return len(data)


class _Raw(nn.Module):
    """Images in, boxes [1, A, 4] and scores [1, K, A] out."""

    def __init__(self, network: SSD) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        boxes, scores = self.network.boxes_and_scores(images)
        return boxes, scores.transpose(1, 2)


def _raw_model(detector: Detector) -> Any:
    """Of a float network: an int8 one with the rounded weights, its inputs not rounded yet."""
    network = copy.deepcopy(detector.network).eval()
    fold_norms(network)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, QuantConv2d):
            conv = nn.Conv2d(
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,  # type: ignore[arg-type]  # a pair
                layer.stride,  # type: ignore[arg-type]  # a pair
                layer.padding,  # type: ignore[arg-type]  # a pair
                groups=layer.groups,
            )
            conv.weight = nn.Parameter(layer.weight)
            conv.bias = nn.Parameter(layer.bias)
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, conv)
    height, width = detector.input_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            _Raw(network).eval(),
            (torch.zeros(1, 3, height, width),),
            input_names=[_INPUT],
            output_names=["all_boxes", "all_scores"],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def _quantize(onnx: Any, proto: Any, detector: Detector) -> None:
    """Put QuantizeLinear and DequantizeLinear before each convolution, and store its weights in int8."""
    layers = {f"network.{name}.weight": layer for name, layer in quantized_layers(detector).items()}
    nodes, made = [], []
    for node in proto.graph.node:
        layer = layers.get(node.input[1]) if node.op_type == "Conv" else None
        if layer is not None:
            name = node.input[1]
            scale = layer.input_quant.scale.detach().numpy().reshape(()).astype(np.float32)
            made += [
                onnx.numpy_helper.from_array(scale, f"{name}.input_scale"),
                onnx.numpy_helper.from_array(np.array(0, np.int8), f"{name}.zero"),
                onnx.numpy_helper.from_array(layer.integers.numpy(), f"{name}.int8"),
                onnx.numpy_helper.from_array(layer.weight_scale.numpy().reshape(-1), f"{name}.scale"),
                onnx.numpy_helper.from_array(np.zeros(layer.out_channels, np.int8), f"{name}.zeros"),
            ]
            rounded, given = f"{name}.rounded", f"{name}.given"
            ends = [f"{name}.input_scale", f"{name}.zero"]
            nodes += [
                onnx.helper.make_node("QuantizeLinear", [node.input[0], *ends], [rounded]),
                onnx.helper.make_node("DequantizeLinear", [rounded, *ends], [given]),
                onnx.helper.make_node(
                    "DequantizeLinear",
                    [f"{name}.int8", f"{name}.scale", f"{name}.zeros"],
                    [f"{name}.real"],
                    axis=0,
                ),
            ]
            node.input[0], node.input[1] = given, f"{name}.real"
        nodes.append(node)
    kept = [one for one in proto.graph.initializer if one.name not in layers]
    nodes = [copy.deepcopy(node) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    del proto.graph.initializer[:]
    proto.graph.initializer.extend([*kept, *made])
    named = [value for value in proto.graph.value_info if value.name not in layers]
    named = [copy.deepcopy(value) for value in named]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(named)


def _suppress(onnx: Any, proto: Any, settings: NmsSettings) -> None:
    """Append class-wise non-maximum suppression and the order by scores."""
    helper, numbers = onnx.helper, onnx.numpy_helper
    graph = proto.graph
    constants = {
        "nms.most": np.array([settings.max_detections], np.int64),
        "nms.max_iou": np.array([settings.max_iou], np.float32),
        "nms.min_score": np.array([settings.min_score], np.float32),
        "nms.class_column": np.array(1, np.int64),
        "nms.box_column": np.array(2, np.int64),
        "nms.first": np.array(0, np.int64),
    }
    graph.initializer.extend(numbers.from_array(value, name) for name, value in constants.items())
    node = helper.make_node
    graph.node.extend(
        [
            node(
                "NonMaxSuppression",
                ["all_boxes", "all_scores", "nms.most", "nms.max_iou", "nms.min_score"],
                ["nms.kept"],
            ),
            node("Gather", ["nms.kept", "nms.class_column"], ["nms.labels"], axis=1),
            node("Gather", ["nms.kept", "nms.box_column"], ["nms.places"], axis=1),
            node("Gather", ["all_boxes", "nms.first"], ["nms.boxes"], axis=0),
            node("Gather", ["nms.boxes", "nms.places"], ["nms.kept_boxes"], axis=0),
            # Rows of nms.kept are image, class, box: the places of the scores.
            node("GatherND", ["all_scores", "nms.kept"], ["nms.kept_scores"]),
            node("Shape", ["nms.kept_scores"], ["nms.count"]),
            node("Min", ["nms.count", "nms.most"], ["nms.number"]),
            node("TopK", ["nms.kept_scores", "nms.number"], ["scores", "nms.order"], axis=0),
            node("Gather", ["nms.kept_boxes", "nms.order"], ["boxes"], axis=0),
            node("Gather", ["nms.labels", "nms.order"], ["labels"], axis=0),
        ]
    )
    kinds = onnx.TensorProto
    del graph.output[:]
    graph.output.extend(
        [
            helper.make_tensor_value_info("boxes", kinds.FLOAT, ["detections", 4]),
            helper.make_tensor_value_info("scores", kinds.FLOAT, ["detections"]),
            helper.make_tensor_value_info("labels", kinds.INT64, ["detections"]),
        ]
    )


def _onnx() -> Any:
    try:
        import onnx
        import onnxscript  # noqa: F401  # of torch's exporter
    except ImportError as error:
        raise InputError(
            f"the export to ONNX needs onnx and onnxscript ({error}): pip install 'modicum[detect]'"
        ) from error
    return onnx
