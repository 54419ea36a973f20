"""Training: it learns, goes on after a stop, and fails in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from modicum.errors import InputError, ModelError
from modicum.vision.detect.augment import NONE
from modicum.vision.detect.detector import Detector
from modicum.vision.detect.detector_file import load_detector
from modicum.vision.detect.entry import train_detector
from modicum.vision.detect.evaluation import evaluate
from modicum.vision.detect.guidance import GuidanceSettings, Guide
from modicum.vision.detect.loaded_images import TrainingImage, load_test_images, load_training_images
from modicum.vision.detect.read_dataset import read_dataset
from modicum.vision.detect.recipe import Recipe
from modicum.vision.detect.ssd import SSD
from modicum.vision.detect.training import DetectorTraining, new_network, training_checkpoint
from tests.vision.detect.scenes import SIZE, tiny_detector, tiny_network, tiny_settings, write_voc


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc(tmp_path_factory.mktemp("data") / "voc", 8)


@pytest.fixture(scope="module")
def images(folder: Path) -> list[TrainingImage]:
    return load_training_images(read_dataset(folder), SIZE)


def test_a_network_learns_a_few_pictures(folder: Path, images: list[TrainingImage]) -> None:
    """A smoke test: discs and squares that were learned by heart are found again."""
    network = new_network(tiny_settings(width=0.25), 0)
    recipe = Recipe(epochs=20, batch=4, learning_rate=4e-3, augment=NONE)
    losses = DetectorTraining(network, images, recipe).run()
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    found = evaluate(Detector(network), load_test_images(read_dataset(folder), SIZE))
    assert found.map50 > 0.8
    assert found.voc > 0.8
    assert found.to_dict()["boxes"] == 16


def test_a_teacher_changes_what_is_learned(folder: Path, tmp_path: Path) -> None:
    data, recipe = read_dataset(folder), Recipe(epochs=1, batch=4)
    found = {}
    for name, teacher in (("alone", None), ("again", None), ("guided", tiny_detector(seed=3))):
        train_detector(data, tiny_settings(), recipe, tmp_path / f"{name}.safetensors", teacher=teacher)
        found[name] = load_detector(tmp_path / f"{name}.safetensors").network.state_dict()
    name = "heads.0.classes.weight"
    assert torch.equal(found["alone"][name], found["again"][name])
    assert not torch.equal(found["alone"][name], found["guided"][name])


def _trained(
    images: list[TrainingImage], recipe: Recipe, is_guided: bool, path: Path | None = None, stop: int = 0
) -> SSD:
    network = new_network(tiny_settings(), 0)
    guide = None
    if is_guided:
        torch.manual_seed(7)
        guide = Guide(tiny_network(seed=3), network, GuidanceSettings())
    checkpoint = None if path is None else training_checkpoint(path, recipe.to_dict())

    def tell(_: str, done: int, __: int) -> None:
        if stop and done == stop:
            raise KeyboardInterrupt

    DetectorTraining(network, images, recipe, guide, checkpoint).run(tell)
    return network


@pytest.mark.parametrize("is_guided", [False, True])
def test_a_stopped_run_goes_on_and_ends_as_if_it_had_not_been(
    images: list[TrainingImage], tmp_path: Path, is_guided: bool
) -> None:
    recipe = Recipe(epochs=2, batch=4, save_every=2)
    whole = _trained(images, recipe, is_guided)
    path = tmp_path / "run.training"
    with pytest.raises(KeyboardInterrupt):
        _trained(images, recipe, is_guided, path, stop=3)
    assert path.exists()
    resumed = _trained(images, recipe, is_guided, path)
    a, b = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(InputError, match="training with another"):
        _trained(images, Recipe(epochs=3, batch=4), is_guided, path)


def test_a_batch_of_one_value_for_each_channel_is_no_trouble(images: list[TrainingImage]) -> None:
    """The coarsest map of a small input has one cell, and the last batch may have one image."""
    network = new_network(tiny_settings(), 0)
    assert (1, 1) in network.map_sizes
    assert len(DetectorTraining(network, images[:3], Recipe(epochs=1, batch=2)).run()) == 2


def test_a_run_goes_on_with_the_same_images_and_teacher_only(folder: Path, tmp_path: Path) -> None:
    data = read_dataset(folder)
    recipe = Recipe(epochs=1, batch=4, save_every=1)

    def stop(doing: str, done: int, _: int) -> None:
        if (doing, done) == ("training", 1):
            raise KeyboardInterrupt

    out = tmp_path / "x.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_detector(data, tiny_settings(), recipe, out, teacher=tiny_detector(seed=3), progress=stop)
    with pytest.raises(InputError, match="training with another"):
        train_detector(data, tiny_settings(), recipe, out, teacher=tiny_detector(seed=4))
    moved = replace(data, images=[replace(one, boxes=one.boxes + 1) for one in data.images])
    with pytest.raises(InputError, match="training with another"):
        train_detector(moved, tiny_settings(), recipe, out, teacher=tiny_detector(seed=3))
    train_detector(data, tiny_settings(), recipe, out, teacher=tiny_detector(seed=3))


def test_a_loss_that_is_no_number_is_one_line(images: list[TrainingImage], tmp_path: Path) -> None:
    recipe = Recipe(epochs=3, batch=4, learning_rate=1e20, warmup=0.0, save_every=1)
    with pytest.raises(ModelError, match=r"the loss of step \d is .*lower learning rate"):
        _trained(images, recipe, False, tmp_path / "run.training")
    assert not (tmp_path / "run.training").exists()
    with pytest.raises(InputError, match="no image to learn from"):
        _trained([], recipe, False)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"warmup": 2}, "warmup is 2"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_recipes_out_of_range_are_one_line(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        Recipe(**options)


def test_each_epoch_sees_every_image_once() -> None:
    recipe = Recipe(epochs=2, batch=3).schedule
    assert recipe.num_steps(8) == 6
    first = torch.cat([recipe.rows(step, 8) for step in range(3)])
    second = torch.cat([recipe.rows(step, 8) for step in range(3, 6)])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(8))
    assert first.tolist() != second.tolist()
    assert max(recipe.rate(step, 100) for step in range(100)) == recipe.learning_rate
    assert recipe.rate(99, 100) < 0.01 * recipe.learning_rate
