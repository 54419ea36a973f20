"""Blockwise distillation: a variant learns to map a reference block's inputs to its outputs, in isolation."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from modicum.distill.training import TrainingSettings
from modicum.errors import InputError
from modicum.search.batchnorm import reset_statistics, statistics_rows
from modicum.search.network import BlockNetwork, is_finite
from modicum.search.noise import ErrorSums, channel_last, noise_to_signal


class Inputs(Protocol):
    """Inputs of a network by their numbers; a tensor [n, …] is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class BlockwiseSettings:
    """How a variant is trained: Adam, a linear warm-up and a cosine, clipped gradients.

    Attributes:
        epochs: over the inputs.
        batch: inputs of a step.
        learning_rate: the highest.
        max_norm: to which gradients are clipped.
        cache_nbytes: a block's features are kept in memory if they take at most this, and else made again in
            every epoch of every variant.
        seed: of weights and orders.

    Raises:
        InputError: a value is out of range.
    """

    epochs: int = 1
    batch: int = 32
    learning_rate: float = 2e-2
    max_norm: float = 5.0
    cache_nbytes: int = 2**30
    seed: int = 0

    def __post_init__(self) -> None:
        if self.cache_nbytes < 0:
            raise InputError(f"cache_nbytes is {self.cache_nbytes}: give 0 or more bytes")
        self.schedule  # noqa: B018  # checks the rest

    @property
    def schedule(self) -> TrainingSettings:
        """Steps, rates and orders, as `modicum.distill` has them."""
        return TrainingSettings.of(self)


def chunks(count: int, size: int) -> Iterator[Tensor]:
    """The numbers from 0 to count - 1, `size` at a time."""
    for start in range(0, count, size):
        yield torch.arange(start, min(start + size, count))


class BlockFeatures:
    """What enters and leaves a block of the reference, for every input.

    Args:
        reference: in eval mode.
        number: of the block.
        inputs: of the network.
        cache_nbytes: kept in memory if all of it takes at most this.
    """

    def __init__(self, reference: BlockNetwork, number: int, inputs: Inputs, cache_nbytes: int) -> None:
        self.reference, self.number, self.inputs = reference.eval(), number, inputs
        self._kept: tuple[Tensor, Tensor] | None = None
        first, second = self._make(torch.arange(min(2, len(inputs))))
        nbytes = (
            first[:1].numel() * first.element_size() + second[:1].numel() * second.element_size()
        ) * len(inputs)
        sums = ErrorSums(channel_last(second).shape[-1])
        pairs = []
        for rows in chunks(len(inputs), 256):
            pair = self._make(rows)
            sums.add(pair[1])
            if nbytes <= cache_nbytes:
                pairs.append(pair)
        self.variance: Tensor = sums.variance
        """[C], of the block's output."""
        if pairs:
            self._kept = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])

    def __len__(self) -> int:
        return len(self.inputs)

    def pair(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Input and output of the block, for these inputs."""
        if self._kept is None:
            return self._make(rows)
        return self._kept[0][rows], self._kept[1][rows]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All in order."""
        for rows in chunks(len(self), size):
            yield self.pair(rows)

    @torch.no_grad()
    def _make(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        before = self.reference.features(self.inputs[rows], self.number)
        return before, self.reference.blocks[self.number](before)


def train_block(block: nn.Module, features: BlockFeatures, settings: BlockwiseSettings) -> bool:
    """Train a block in place on the noise-to-signal ratio, and reset its statistics.

    Args:
        block: in eval mode before and after.
        features: to learn from.

    Returns:
        Whether it went well; False if the loss or a weight is not a finite number.
    """
    schedule = settings.schedule
    parameters = [p for p in block.parameters() if p.requires_grad]
    if parameters:
        optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
        total = schedule.num_steps(len(features))
        block.train()
        for step in range(total):
            before, expected = features.pair(schedule.rows(step, len(features)))
            if len(before) < 2 and total > 1:
                continue  # one input alone has no variance to normalise by
            loss = noise_to_signal(block(before), expected, features.variance)
            if not math.isfinite(float(loss.detach())):
                return False
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_norm)
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step, total)
            optimizer.step()
        block.eval()
    if not is_finite(block):
        return False
    rows = statistics_rows(len(features), settings.batch)
    reset_statistics(block, (features.pair(one)[0] for one in rows))
    return True


@torch.no_grad()
def block_error(block: nn.Module, features: BlockFeatures, batch: int = 256) -> float:
    """The noise-to-signal ratio of a block on features it has not seen; NaN if an output is not finite."""
    sums = ErrorSums(len(features.variance))
    for before, expected in features.batches(batch):
        sums.add(expected, block(before))
    return sums.value


def data_digest(inputs: Inputs) -> str:
    """16 digits of a digest of all inputs."""
    digest = hashlib.sha256(str(len(inputs)).encode())
    for rows in chunks(len(inputs), 256):
        digest.update(inputs[rows].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
