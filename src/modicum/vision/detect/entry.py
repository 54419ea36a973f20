"""Entry: data sets and files in, trained or pruned detectors in files out, as the command line does it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modicum.errors import InputError
from modicum.search.network import fingerprint
from modicum.vision.detect.cost import CostTable
from modicum.vision.detect.dataset import DetectionDataset
from modicum.vision.detect.detector import Detector
from modicum.vision.detect.detector_file import load_detector, save_detector
from modicum.vision.detect.guidance import GuidanceSettings, Guide
from modicum.vision.detect.loaded_images import Progress, images_digest, load_training_images
from modicum.vision.detect.pruning.prune import PruneResult, PruneSettings, prune
from modicum.vision.detect.recipe import Recipe
from modicum.vision.detect.ssd_settings import SSDSettings
from modicum.vision.detect.training import DetectorTraining, new_network, training_checkpoint


@dataclass(frozen=True)
class DetectorSummary:
    """A detector in numbers."""

    parameters: int
    macs: int
    nbytes: int
    loss_first: float
    loss_last: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return dict(vars(self))


def train_detector(
    data: DetectionDataset,
    settings: SSDSettings,
    recipe: Recipe,
    out: Path,
    *,
    teacher: Detector | None = None,
    guidance: GuidanceSettings | None = None,
    progress: Progress | None = None,
) -> DetectorSummary:
    """Train a detector and write it to a file.

    A run that was stopped goes on if it is started again with the same `out`; until it ends, a checkpoint is
    beside it.

    Args:
        teacher: a detector to be guided by.
        guidance: weights of what it tells.

    Raises:
        InputError: `out` exists, no image can be read, or a checkpoint is of another training.
        ModelError: the loss is not a number, a file cannot be written, or the teacher does not fit.
    """
    check_new_file(out)
    images = load_training_images(data, (settings.height, settings.width), progress)
    network = new_network(settings, recipe.seed)
    guidance = guidance or GuidanceSettings()
    guide = None if teacher is None else Guide.seeded(teacher.network, network, guidance, recipe.seed)
    about = {"recipe": recipe.to_dict(), "images": len(images), "guided": teacher is not None}
    path = out.with_name(f"{out.name}.training")
    told_by = None if teacher is None else [fingerprint(teacher.network), asdict(guidance)]
    checkpoint = training_checkpoint(path, settings.to_dict(), about, images_digest(images), told_by)
    losses = DetectorTraining(network, images, recipe, guide, checkpoint).run(progress)
    detector = Detector(network, about)
    nbytes = save_detector(detector, out)
    checkpoint.remove()
    return _summary(settings, nbytes, losses)


def prune_detector(
    model: Path,
    data: DetectionDataset,
    settings: PruneSettings,
    out: Path,
    progress: Progress | None = None,
) -> tuple[PruneResult, DetectorSummary]:
    """Prune the detector of a file and write it to another one; resumable like training.

    Raises:
        InputError, ModelError: as `prune`, `load_detector` and `load_training_images`; or `out` exists.
    """
    check_new_file(out)
    teacher = load_detector(model)
    images = load_training_images(data, teacher.input_size, progress)
    state = out.with_name(f"{out.name}.state")
    result = prune(teacher, images, settings, state=state, progress=progress)
    nbytes = save_detector(result.detector, out)
    shutil.rmtree(state, ignore_errors=True)
    return result, _summary(result.detector.network.settings, nbytes, result.losses)


def check_new_file(out: Path) -> None:
    """Raise if a path exists, so that nothing is lost.

    Raises:
        InputError: it does.
    """
    if out.exists():
        raise InputError(f"{out} exists: give another --out, or remove it")
    if not out.suffix:
        raise InputError(f"{out} has no ending: give a file such as {out.name}.safetensors")


def _summary(settings: SSDSettings, nbytes: int, losses: Sequence[float]) -> DetectorSummary:
    table = CostTable.of(settings)
    channels = settings.channels
    return DetectorSummary(
        table.num_parameters(channels), table.macs(channels), nbytes, losses[0], losses[-1]
    )
