"""Channel scores: how much each channel matters, for each channel group.

Our design (see the package's docstring). A tensor of a group has for each channel a size: the 2-norm of a
convolution's weights ("magnitude"), |γ| of a norm ("bn"), or Σ |w · ∂L/∂w| of either ("taylor", Molchanov
et al. 2019, arXiv 1906.10771). Sizes are divided by their root mean square over the group, averaged over the
group's tensors, and divided by the group's mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from modicum.errors import InputError
from modicum.vision.detect.multibox_loss import Targets, multibox_loss
from modicum.vision.detect.pruning.channel_graph import Member, members
from modicum.vision.detect.ssd import SSD

Score = Literal["magnitude", "taylor", "bn"]
Batches = Iterable[tuple[Tensor, Targets]]


def check_score(name: str) -> Score:
    """The name.

    Raises:
        InputError: it is not known.
    """
    for known in get_args(Score):
        if name == known:
            return known  # type: ignore[no-any-return]  # one of the literals
    raise InputError(f"the score is {name!r}: choose one of {', '.join(get_args(Score))}")


def channel_scores(network: SSD, score: Score, batches: Batches = ()) -> dict[str, Tensor]:
    """Of each group [C] float64, with a mean of 1.

    Args:
        batches: images and targets; only "taylor" uses them.

    Raises:
        InputError: there is no batch for "taylor".
        ModelError: the network cannot be pruned.
    """
    groups = members(network)
    weights = _weights(network, score, batches)
    return {name: _combined(group, weights, score) for name, group in groups.items()}


def _weights(network: SSD, score: Score, batches: Batches) -> Callable[[Member], Tensor]:
    """Gives what is measured of a member: [channels, rest], not negative."""
    modules: Mapping[str, nn.Module] = dict(network.named_modules())
    values = {name: parameter.detach().double() for name, parameter in network.named_parameters()}
    if score == "taylor":
        gradients = mean_gradients(network, batches)
        values = {name: value * gradients[name].double() for name, value in values.items()}

    def measured(member: Member) -> Tensor:
        value = values[f"{member.name}.weight"].abs()
        module = modules[member.name]
        if member.axis == "in" and isinstance(module, nn.Conv2d):
            value = value.transpose(0, 1)
        return value.reshape(len(value), -1)

    return measured


def _combined(group: list[Member], measured: Callable[[Member], Tensor], score: Score) -> Tensor:
    if score == "bn":
        group = [member for member in group if member.axis == "norm"]
    elif score == "magnitude":
        group = [member for member in group if member.axis != "norm"]
    sizes = []
    for member in group:
        value = measured(member)
        size = value.sum(1) if score == "taylor" else value.square().sum(1).sqrt()
        sizes.append(_divided(size, size.square().mean().sqrt()))
    mean = torch.stack(sizes).mean(0)
    return _divided(mean, mean.mean())


def _divided(sizes: Tensor, by: Tensor) -> Tensor:
    """All equal where nothing differs from 0."""
    return sizes / by if float(by) > 0 else torch.ones_like(sizes)


def mean_gradients(network: SSD, batches: Batches) -> dict[str, Tensor]:
    """Of the multibox loss over batches, for each parameter; in evaluation mode, so that norms stay.

    Raises:
        InputError: there is no batch.
    """
    was_training = network.training
    network.eval().zero_grad()
    count = 0
    for images, targets in batches:
        outputs = network(images)
        torch.autograd.backward(multibox_loss(outputs.logits, outputs.offsets, targets))
        count += 1
    if not count:
        raise InputError("the score taylor needs images: give at least one batch")
    found = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / count
        for name, parameter in network.named_parameters()
    }
    network.zero_grad()
    network.train(was_training)
    return found
