"""OnnxDetector: a detector's ONNX file, run by onnxruntime on whole images."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modicum.errors import InputError, ModelError
from modicum.packages import import_lone_package
from modicum.vision.detect.detector import in_image
from modicum.vision.detect.image import letterboxed
from modicum.vision.detect.nms import Detections, NmsSettings
from modicum.vision.detect.ssd_settings import SSDSettings


@dataclass(frozen=True)
class OnnxDetector:
    """A session of onnxruntime and the detector's record.

    Attributes:
        session: of onnxruntime.
        settings: the record.
        min_score: detections with a lower or equal score are not given out, whatever is asked for.
        num_threads: of the session.
    """

    session: Any
    settings: SSDSettings
    min_score: float = 0.0
    num_threads: int = 1

    @classmethod
    def load(cls, path: str | Path, num_threads: int = 1) -> OnnxDetector:
        """From a file of `export_onnx`.

        Raises:
            InputError: there is no such file, or onnxruntime is not installed.
            ModelError: it is no such file.
        """
        if not Path(path).is_file():
            raise InputError(f"there is no detector {path}: give a file that modicum detect export wrote")
        runtime = import_lone_package("onnxruntime", "an .onnx file")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.log_severity_level = 3
        try:
            session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            told = json.loads(session.get_modelmeta().custom_metadata_map["modicum"])
            settings = SSDSettings.from_dict(told["settings"])
            return cls(session, settings, float(told.get("min_score", 0)), num_threads)
        except Exception as error:  # onnxruntime's errors have no common base but this
            raise ModelError(
                f"{path} is no detector that modicum detect export wrote ({type(error).__name__}): export "
                "it again"
            ) from error

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, by label."""
        return self.settings.classes

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the input in pixels."""
        return self.settings.height, self.settings.width

    def detect(self, image: Any, settings: NmsSettings | None = None) -> Detections:
        """What is in an RGB image of Pillow.

        Scores up to the file's own least are not given out, with a warning where `settings` ask for them. The
        file's greatest overlap holds.
        """
        pixels, letterbox = letterboxed(image, self.input_size)
        (found,) = self.detect_inputs(pixels[None], settings)
        return in_image(found, letterbox, (image.height, image.width))

    def detect_inputs(self, inputs: Tensor, settings: NmsSettings | None = None) -> list[Detections]:
        """What is in each of the inputs [B, 3, H, W] in RGB, 0 to 255."""
        if settings is not None and settings.min_score < self.min_score:
            warnings.warn(
                f"detections with scores above {settings.min_score:g} are asked for, and the ONNX file gives "
                f"only those above {self.min_score:g}: export it with --min-score {settings.min_score:g}",
                stacklevel=2,
            )
        found = []
        for one in inputs:
            boxes, scores, labels = (
                torch.from_numpy(value)
                for value in self.session.run(None, {"images": one[None].float().numpy()})
            )
            if settings is not None:
                stays = (scores > settings.min_score).nonzero()[: settings.max_detections, 0]
                boxes, scores, labels = boxes[stays], scores[stays], labels[stays]
            found.append(Detections(boxes, scores, labels))
        return found
