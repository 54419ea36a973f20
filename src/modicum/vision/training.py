"""Training of image networks, alone or with a teacher; it can go on where it was stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modicum.distill.checkpoint import Progressed, TrainingCheckpoint
from modicum.distill.training import generator
from modicum.errors import ModelError
from modicum.search.batchnorm import reset_statistics, statistics_rows
from modicum.search.blockwise import chunks
from modicum.search.network import is_finite
from modicum.vision.augment import augmented
from modicum.vision.images import ImageSet
from modicum.vision.recipe import ImageRecipe

Progress = Callable[[str, int, int], object]


def train(
    network: nn.Module,
    images: ImageSet,
    recipe: ImageRecipe,
    *,
    teacher: nn.Module | None = None,
    checkpoint: TrainingCheckpoint | None = None,
    progress: Progress | None = None,
    doing: str = "training",
) -> list[float]:
    """Train a network in place.

    At the end batch normalisation gets statistics of images that are not augmented: after few steps its own
    ones lag behind the weights.

    The loss is cross entropy, and with a teacher (1 - w)·cross entropy + w·T²·KL(teacher ‖ student) at the
    temperature T (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        network: gives logits [B, C].
        images: to learn from.
        recipe: how.
        teacher: gives logits of the same classes; sees the same augmented images.
        checkpoint: written every so many steps; a training that has one goes on from there, and gives what it
            would have given without a stop.
        progress: called with `doing`, steps done, and in all.
        doing: what progress is told.

    Returns:
        The loss of each step, in nats.

    Raises:
        ModelError: the loss or a weight is not a finite number.
    """
    schedule, tell = recipe.schedule, progress or (lambda *_: None)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    progressed = Progressed() if checkpoint is None else checkpoint.load(network, optimizer)
    total = schedule.num_steps(len(images))
    tell(doing, progressed.step, total)
    if teacher is not None:
        teacher.eval()
    while progressed.step < total:
        step = progressed.step
        rows = schedule.rows(step, len(images))
        # What is random in a step depends on its number only, so that a resumed run repeats it.
        inputs = augmented(images[rows], generator(recipe.seed, step), flip=recipe.flip, shift=recipe.shift)
        network.train(len(rows) > 1)  # one image alone has no variance to normalise by
        loss = _loss(network, teacher, inputs, images.labels[rows], recipe)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ModelError(
                f"the loss of step {step + 1} is {value}: give a lower learning rate than "
                f"{recipe.learning_rate:g}"
            )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.max_norm)
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step, total)
        optimizer.step()
        progressed.step += 1
        progressed.losses.append(value)
        if checkpoint is not None and progressed.step % recipe.save_every == 0:
            checkpoint.save(network, optimizer, progressed)
        tell(doing, progressed.step, total)
    network.eval()
    reset_statistics(network, statistics_batches(images, recipe.batch))
    if not is_finite(network):
        raise ModelError(f"a weight is not finite: give a lower learning rate than {recipe.learning_rate:g}")
    return progressed.losses


def statistics_batches(images: ImageSet, size: int) -> Iterator[Tensor]:
    """Inputs for the statistics of batch normalisation (see `statistics_rows`)."""
    for rows in statistics_rows(len(images), size):
        yield images[rows]


def _loss(
    network: nn.Module, teacher: nn.Module | None, inputs: Tensor, labels: Tensor, recipe: ImageRecipe
) -> Tensor:
    logits = network(inputs)
    hard = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
    if teacher is None or recipe.distill_weight == 0:
        return hard
    with torch.no_grad():
        expected = (teacher(inputs) / recipe.temperature).log_softmax(-1)
    found = (logits / recipe.temperature).log_softmax(-1)
    soft = F.kl_div(found, expected, reduction="batchmean", log_target=True) * recipe.temperature**2
    return (1 - recipe.distill_weight) * hard + recipe.distill_weight * soft


@torch.no_grad()
def accuracy(network: nn.Module, images: ImageSet, batch: int = 256) -> float:
    """Share of images whose class has the largest logit; logits that are not finite are wrong."""
    network.eval()
    right = 0
    for rows in chunks(len(images), batch):
        logits = network(images[rows])
        is_finite_row = logits.isfinite().all(-1)
        right += int(((logits.argmax(-1) == images.labels[rows]) & is_finite_row).sum())
    return right / len(images)
