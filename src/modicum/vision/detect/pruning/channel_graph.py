"""Channel graph: which tensors each channel group is made of, from torch-pruning's dependency graph.

torch-pruning (MIT; Fang et al. 2023, "DepGraph", arXiv 2301.12900) finds the tensors by tracing and cuts
them. It takes an operation that it does not know for one that keeps channels apart, so operations are checked
here first, and what it finds is compared with the names in the network.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modicum.errors import ModelError
from modicum.packages import import_package
from modicum.vision.detect.conv_norm import ConvNorm
from modicum.vision.detect.detector_file import check_shapes
from modicum.vision.detect.ssd import SSD

_PRUNABLE = {
    "AccumulateGrad",
    "AddBackward0",
    "AvgPool2DBackward0",
    "ConvolutionBackward0",
    "HardtanhBackward0",
    "LeakyReluBackward0",
    "MaxPool2DWithIndicesBackward0",
    "NativeBatchNormBackward0",
    "ReluBackward0",
    "SiluBackward0",
    "ToCopyBackward0",
    "UpsampleNearest2DBackward0",
}
"""Operations that keep channels apart or that torch-pruning cuts, as torch names their gradients."""


@dataclass(frozen=True)
class Member:
    """A tensor of a group: the axis of a module's weight on which the group's channels lie."""

    name: str
    axis: Literal["out", "in", "norm"]


def members(network: SSD) -> dict[str, list[Member]]:
    """The tensors of each channel group of a network.

    Raises:
        ModelError: an operation cannot be pruned (it is named), or torch-pruning finds other tensors than the
            network's names say.
    """
    check_operations(network)
    graph = _dependency_graph(network)
    names = {module: name for name, module in network.named_modules()}
    found = {}
    for group, root in _roots(network).items():
        found[group] = [
            Member(names[dep.target.module], _axis(dep))
            for dep, _ in _group(graph, root, list(range(root.out_channels)))
            if dep.target.module in names and isinstance(dep.target.module, nn.Conv2d | nn.BatchNorm2d)
        ]
        _compare(network, group, found[group])
    return found


def kept_network(network: SSD, kept: Mapping[str, Tensor]) -> SSD:
    """A copy of a network with the given channels of some groups, cut by torch-pruning; every tensor is then
    compared with the record.

    Args:
        kept: of a group, the numbers of the channels that stay; [C'] int64, in any order.

    Raises:
        ModelError: an operation cannot be pruned, or a tensor has another shape than its record says.
    """
    check_operations(network)
    found = copy.deepcopy(network).eval()
    graph, roots = _dependency_graph(found), _roots(found)
    channels = {}
    for group, stays in kept.items():
        count = found.settings.channels[group]
        cut = sorted(set(range(count)) - set(stays.tolist()))
        channels[group] = count - len(cut)
        if not channels[group]:
            raise ModelError(f"no channel of {group} would stay: keep at least one")
        if cut:
            _group(graph, roots[group], cut).prune()
    found.settings = found.settings.with_channels(channels)
    check_shapes(found)
    return found


def channels_in(network: SSD) -> dict[str, int]:
    """Channels of each group as the network's convolutions have them, whatever its record says."""
    return {group: root.out_channels for group, root in _roots(network).items()}


def check_operations(network: SSD) -> None:
    """Raise unless all operations between input and heads are known to keep channels apart.

    Raises:
        ModelError: one is not; it is named.
    """
    with _evaluating(network), torch.enable_grad():
        outputs = network.raw_outputs(_example(network))
    todo: list[Any] = [output.grad_fn for output in outputs]
    seen = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().rpartition("::")[2] not in _PRUNABLE:
            operation = node.name().rpartition("::")[2].removesuffix("0").removesuffix("Backward")
            raise ModelError(
                f"the network cannot be pruned: its operation {operation} may mix channels, and it is not "
                "known how to cut it; use a backbone of convolutions, norms, ReLU, pooling and sums"
            )
        todo.extend(following for following, _ in node.next_functions)


class _evaluating:  # noqa: N801  # used as a function
    """Evaluation mode for a while, so that a trial run leaves the norms' statistics alone."""

    def __init__(self, network: SSD) -> None:
        self._network, self._mode = network, network.training

    def __enter__(self) -> None:
        self._network.eval()

    def __exit__(self, *_: object) -> None:
        self._network.train(self._mode)


def _example(network: SSD) -> Tensor:
    return torch.zeros(1, 3, network.settings.height, network.settings.width)


def _dependency_graph(network: SSD) -> Any:
    pruning = import_package("torch_pruning", "detect")
    with _evaluating(network), torch.enable_grad():
        return pruning.DependencyGraph().build_dependency(
            network,
            _example(network),
            forward_fn=lambda model, images: model.raw_outputs(images),
            verbose=False,
        )


def _group(graph: Any, root: nn.Conv2d, cut: list[int]) -> Any:
    pruning = import_package("torch_pruning", "detect")
    return graph.get_pruning_group(root, pruning.prune_conv_out_channels, cut)


def _roots(network: SSD) -> dict[str, nn.Conv2d]:
    """Of each group the first full convolution that writes to it."""
    found: dict[str, nn.Conv2d] = {}
    for module in network.modules():
        if isinstance(module, ConvNorm) and not module.shape.is_depthwise:
            found.setdefault(module.outputs, module.conv)
    return found


def _axis(dep: Any) -> Literal["out", "in", "norm"]:
    if isinstance(dep.target.module, nn.BatchNorm2d):
        return "norm"
    return "in" if "in_channels" in dep.handler.__name__ else "out"


def _compare(network: SSD, group: str, found: list[Member]) -> None:
    """That torch-pruning's tensors are those that the names say."""
    wanted = set()
    for name, module in network.named_modules():
        if isinstance(module, ConvNorm):
            if module.outputs == group:
                wanted |= {Member(f"{name}.conv", "out"), Member(f"{name}.norm", "norm")}
            if module.inputs == group and not module.shape.is_depthwise:
                wanted.add(Member(f"{name}.conv", "in"))
    for level in range(len(network.heads)):
        if group == f"head{level}":
            wanted |= {Member(f"heads.{level}.{part}", "in") for part in ("classes", "boxes")}
    if wanted != set(found):
        odd = sorted(f"{one.name} ({one.axis})" for one in wanted ^ set(found))
        raise ModelError(f"the channels of {group} do not lie where the network's names say: {odd[0]}")
