"""Batch normalisation: its running statistics, measured anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_BATCHES = 16


def statistics_rows(num: int, size: int) -> Iterator[Tensor]:
    """Rows of inputs for `reset_statistics`: at most 16 batches, drawn from all inputs.

    Inputs are often sorted by class, so the first batches would not stand for the others.

    Args:
        num: inputs there are.
        size: inputs of a batch. All batches are whole, unless there are fewer inputs.

    Yields:
        [size] int64; no row twice, and the same rows in each call.
    """
    order = torch.randperm(num, generator=torch.Generator().manual_seed(0))
    for number in range(max(1, min(_BATCHES, num // size))):
        yield order[number * size : (number + 1) * size]


@torch.no_grad()
def reset_statistics(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running mean and variance of every batch normalisation to the mean over batches.

    A network that is assembled from blocks trained in isolation, or a block whose weights have just moved,
    has statistics of other inputs. One pass in training mode, with a cumulative average; weights stay, and so
    do the modes of all modules. Networks without batch normalisation are left as they are.

    Args:
        network: changed in place.
        batches: inputs [B, …]; all count the same.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return
    modes = {module: module.training for module in network.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative
        norm.train()
    try:
        for batch in batches:
            network(batch)
    finally:
        for norm in norms:
            norm.momentum = momenta[norm]
        for module, mode in modes.items():
            module.training = mode
