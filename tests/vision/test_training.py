"""Training: losses, teachers, runs that go on."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modicum.distill.checkpoint import TrainingCheckpoint
from modicum.errors import InputError, ModelError
from modicum.search.batchnorm import reset_statistics, statistics_rows
from modicum.search.network import BlockNetwork, fingerprint
from modicum.vision.images import ImageSet
from modicum.vision.recipe import ImageRecipe
from modicum.vision.reference import ReferenceSettings
from modicum.vision.training import _loss, accuracy, statistics_batches, train
from tests.vision.pictures import image_set

SETTINGS = ReferenceSettings("residual", (16,), (2,), depth=1, stem_channels=8, size=16)
RECIPE = ImageRecipe(epochs=3, batch=16, learning_rate=1e-2, shift=2, save_every=2)


def network(seed: int = 0) -> BlockNetwork:
    torch.manual_seed(seed)
    return SETTINGS.build(3)


def test_it_learns() -> None:
    found, images = network(), image_set(120)
    losses = train(found, images, replace(RECIPE, epochs=6))
    assert len(losses) == 6 * 8
    assert losses[-1] < losses[0]
    assert accuracy(found, image_set(60, seed=1)) > 0.8
    assert not found.training


def test_all_maps_of_a_step_have_channels_last() -> None:
    found, images, orders = network(), image_set(16), []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        orders.append(output.is_contiguous(memory_format=torch.channels_last))

    for module in found.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(keep)
    train(found, images, replace(RECIPE, epochs=1))
    assert len(orders) > 0
    assert all(orders)


class _Logits(nn.Module):
    """Gives the same logits for every image."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1)


def test_the_loss_with_a_teacher_is_the_loops() -> None:
    student, teacher = [0.5, -1.0, 2.0], [1.0, 1.5, -0.5]
    w, t, s = 0.6, 3.0, 0.1
    recipe = replace(RECIPE, distill_weight=w, temperature=t, label_smoothing=s)
    labels = torch.tensor([2, 0])

    def softmax(logits: list[float], tau: float) -> list[float]:
        powers = [math.exp(x / tau) for x in logits]
        return [p / math.fsum(powers) for p in powers]

    hard = 0.0
    for label in (2, 0):
        target = [s / 3 + (1 - s) * (c == label) for c in range(3)]
        hard -= math.fsum(q * math.log(p) for q, p in zip(target, softmax(student, 1.0), strict=True)) / 2
    pairs = zip(softmax(teacher, t), softmax(student, t), strict=True)
    soft = t * t * math.fsum(q * math.log(q / p) for q, p in pairs)
    models = [_Logits(torch.tensor([one], dtype=torch.float64)) for one in (student, teacher)]
    inputs = torch.zeros(2, 3, 4, 4)
    found = _loss(models[0], models[1], inputs, labels, recipe)
    assert float(found.detach()) == pytest.approx((1 - w) * hard + w * soft, rel=1e-12)
    alone = _loss(models[0], None, inputs, labels, recipe)
    assert float(alone.detach()) == pytest.approx(hard, rel=1e-12)


def test_a_stopped_run_goes_on_and_gives_the_same(tmp_path: Path) -> None:
    images, teacher = image_set(40), network(1)
    whole = network()
    losses = train(whole, images, RECIPE, teacher=teacher)
    checkpoint = TrainingCheckpoint(tmp_path / "c.safetensors", "digest")

    def stop(_: str, done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(network(), images, RECIPE, teacher=teacher, checkpoint=checkpoint, progress=stop)
    resumed = network(7)
    seen: list[int] = []
    found = train(
        resumed,
        images,
        RECIPE,
        teacher=teacher,
        checkpoint=checkpoint,
        progress=lambda _, done, total: seen.append(done),
    )
    assert seen[0] == 4  # the last checkpoint
    assert found == losses
    assert fingerprint(resumed) == fingerprint(whole)


def test_a_last_batch_of_one_image_is_no_trouble() -> None:
    assert len(train(network(), image_set(17), RECIPE)) == 6


def test_a_loss_that_is_not_finite_is_told() -> None:
    with pytest.raises(ModelError, match=r"loss of step \d+ is .*lower learning rate than 1e\+30|not finite"):
        train(network(), image_set(40), replace(RECIPE, learning_rate=1e30))


def test_logits_that_are_not_finite_are_wrong() -> None:
    images = image_set(9)
    assert accuracy(_Logits(torch.tensor([[math.nan, 0.0, 0.0]])), images) == 0
    assert accuracy(_Logits(torch.tensor([[0.0, 0.0, 1.0]])), images) == pytest.approx(1 / 3)
    assert F.one_hot(images.labels).sum(0).tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"batch": 1},
        {"label_smoothing": 2.0},
        {"distill_weight": -0.1},
        {"temperature": 0.0},
        {"shift": -1},
        {"learning_rate": math.inf},
    ],
)
def test_recipes_are_checked(change: dict[str, float]) -> None:
    with pytest.raises(InputError):
        replace(RECIPE, **change)  # type: ignore[arg-type]


def test_statistics_are_of_images_that_are_not_augmented() -> None:
    found, images = network(), image_set(32)
    train(found, images, replace(RECIPE, epochs=1))
    stem = found.stem
    with torch.no_grad():
        batches = [stem[0](images[rows]).mean((0, 2, 3)) for rows in statistics_rows(32, 16)]
    torch.testing.assert_close(stem[1].running_mean, (batches[0] + batches[1]) / 2, rtol=1e-4, atol=1e-5)


def test_statistics_are_of_all_classes_though_images_are_sorted_by_class() -> None:
    """As `load_images` gives them: a folder after the other."""
    pixels = torch.cat([torch.full((1000, 3, 2, 2), level, dtype=torch.uint8) for level in (0, 80, 255)])
    labels = torch.arange(3).repeat_interleave(1000)
    images = ImageSet(pixels, labels, ("a", "b", "c"), torch.zeros(3), torch.ones(3))
    norm = nn.BatchNorm2d(3)
    reset_statistics(norm, statistics_batches(images, 32))
    # The mean of 512 draws of a standard deviation below 0.5 is off by more than 6 of its own once in 10^9.
    everything = pixels.double().mean((0, 2, 3)) / 255
    assert norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean.double(), everything, rtol=0, atol=6 * 0.5 / 512**0.5)
