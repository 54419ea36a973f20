"""Blocks: the decoder blocks of a model, the weights in them that may go, and what their inputs are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from modicum.errors import ModelError
from modicum.weights.packed import PackedLinear

_ROUTERS = ("gate", "router", "shared_expert_gate")
"""Linear layers by these names choose experts: a few weights on which much depends."""


@dataclass(frozen=True)
class Matrix:
    """A weight [out, d] that may be pruned: a linear layer's, or one expert's slice of a parameter of all."""

    name: str
    """Such as "model.layers.0.mlp.up_proj.weight", or "….experts.down_proj[3]"."""
    weight: Tensor
    """A view: what is written into it is written into the model."""
    bias: Tensor | None = None

    @property
    def of_attention(self) -> bool:
        """Whether it belongs to the block's attention."""
        return any("attn" in part or "attention" in part for part in self.name.split("."))


@dataclass(frozen=True)
class Block:
    """One decoder block."""

    name: str
    module: nn.Module
    matrices: list[Matrix]


def blocks_of(model: PreTrainedModel) -> list[Block]:
    """The decoder blocks, in order.

    Raises:
        ModelError: there are none, or their weights are not plain linear layers (by the name of one).
    """
    number = int(getattr(model.config.get_text_config(), "num_hidden_layers", 0))
    modules: nn.Module = model
    lists = [
        (name, module)
        for name, module in modules.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == number
    ]
    if not number or not lists:
        raise ModelError(
            f"{type(model).__name__} cannot be pruned: it has no torch.nn.ModuleList of {number} decoder "
            "blocks, its config's num_hidden_layers; give a decoder-only model"
        )
    name, stack = min(lists, key=lambda pair: len(pair[0]))
    found = []
    for index, module in enumerate(stack):
        matrices = _matrices(module, f"{name}.{index}")
        if not matrices:
            kind = type(model).__name__
            raise ModelError(
                f"{kind} cannot be pruned: its block {name}.{index} has no torch.nn.Linear layers; models "
                "whose weights are of another kind (Conv1D, as GPT-2's) are not supported"
            )
        found.append(Block(f"{name}.{index}", module, matrices))
    _refuse_shared(modules, found)
    return found


def _refuse_shared(model: nn.Module, blocks: list[Block]) -> None:
    """Raise if a weight is used in two places: pruned on the inputs of one, it would change the other."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter.data_ptr(), []).append(name)
    for matrix in (matrix for block in blocks for matrix in block.matrices):
        name = matrix.name.partition("[")[0]
        others = [other for other in owners.get(matrix.weight.data_ptr(), []) if other != name]
        if not others:
            continue
        module, other = _same_module(model, name, others[0])
        if module != name:
            raise ModelError(
                f"{module} and {other} are the same module, and pruning it in one place would change the "
                f"other: give one its own copy, model.set_submodule({other!r}, "
                f"copy.deepcopy(model.get_submodule({other!r})))"
            )
        where, _, own = name.rpartition(".")
        raise ModelError(
            f"{name} is tied to {other}, and pruning one would change the other: give one its own copy, "
            f"module = model.get_submodule({where!r}); module.{own} = "
            f"torch.nn.Parameter(module.{own}.detach().clone())"
        )


def _same_module(model: nn.Module, first: str, second: str) -> tuple[str, str]:
    """The names of the largest module that two parameters' names share; the names if it is the parameter."""
    while True:
        above, beside = (name.rpartition(".")[0] for name in (first, second))
        if above == beside or model.get_submodule(above) is not model.get_submodule(beside):
            return first, second
        first, second = above, beside


def _matrices(block: nn.Module, prefix: str) -> list[Matrix]:
    found = []
    for name, module in block.named_modules():
        label = f"{prefix}.{name}"
        if isinstance(module, nn.Linear):
            if name.split(".")[-1] in _ROUTERS:
                continue
            _refuse_special(module, label)
            found.append(Matrix(f"{label}.weight", module.weight.data, module.bias))
        elif isinstance(module, PackedLinear):
            raise ModelError(
                f"{label} keeps its weight packed: load the model with its weights unpacked, "
                "modicum.load(folder, weights='dense')"
            )
        elif hasattr(module, "num_experts"):
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3:
                    found += [Matrix(f"{label}.{own}[{i}]", w) for i, w in enumerate(parameter.data)]
    return found


def _refuse_special(module: nn.Linear, label: str) -> None:
    """Raise unless it is a linear layer as torch has it, with plain floating-point weights."""
    weight = module.weight
    if type(weight.data) is not Tensor:
        raise ModelError(
            f"the weight of {label} is a {type(weight.data).__name__}, not a plain tensor: load the model "
            "with dense weights, as with modicum.load(folder, weights='dense')"
        )
    if type(module) is not nn.Linear or not weight.is_floating_point():
        raise ModelError(
            f"{label} is a {type(module).__name__} with {weight.dtype} weights, and only plain "
            "torch.nn.Linear layers with floating-point weights can be pruned: load a checkpoint that is not "
            "quantized, without quantization_config"
        )


@contextmanager
def one_by_one(model: PreTrainedModel, blocks: list[Block]) -> Iterator[None]:
    """Experts computed one after the other, each as a product of its own that can be heard."""
    if not any(matrix.name.endswith("]") for block in blocks for matrix in block.matrices):
        yield
        return
    change: Any = model.set_experts_implementation
    before = model.config._experts_implementation
    change("eager")
    try:
        yield
    finally:
        change(before)


class Inputs(TorchFunctionMode):
    """While it is on, calls `heard(matrix, input [n, d], again)` for each product with one of the matrices.

    again: the name of the matrix that had this very input before it (keys and values that read what queries
    do), so that statistics can be shared.
    """

    def __init__(self, matrices: list[Matrix], heard: Callable[[Matrix, Tensor, str | None], None]) -> None:
        super().__init__()
        self._known = {(m.weight.data_ptr(), m.weight.shape): m for m in matrices}
        self._heard = heard
        self._last: tuple[Tensor, str] | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and len(args) >= 2:
            matrix = self._known.get((args[1].data_ptr(), args[1].shape))
            if matrix is not None:
                inputs = args[0]
                again = None
                if self._last is not None and self._last[0] is inputs:
                    again = self._last[1]
                else:
                    self._last = inputs, matrix.name
                self._heard(matrix, inputs.detach().flatten(0, -2), again)
        return func(*args, **kwargs)


class _ReachedError(Exception):
    """A block was reached, and no more is wanted."""


class Passes:
    """Calibration text on its way through the blocks, one after the other, so that one block's inputs are all
    that is in memory.

    Args:
        ids: [n, T] token ids of n sequences, no pads.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, blocks: list[Block], ids: Tensor) -> None:
        self._blocks = blocks
        self._how: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first = blocks[0].module
        device = next(first.parameters()).device
        # Beside hidden states a block is called with masks and positions: the same for all sequences.
        hooks = [block.module.register_forward_pre_hook(self._note, with_kwargs=True) for block in blocks]
        try:
            model(ids[:1].to(device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        self.hidden: list[Tensor] = []
        hook = first.register_forward_pre_hook(self._catch, with_kwargs=True)
        try:
            for row in ids:
                try:
                    model(row[None].to(device), use_cache=False)
                except _ReachedError:
                    continue
        finally:
            hook.remove()

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        own = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        self._how.append((args[1:] if args else (), own))

    def _catch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.hidden.append(args[0] if args else kwargs["hidden_states"])
        raise _ReachedError

    @torch.no_grad()
    def through(self, number: int, listen: Inputs | None = None) -> list[Tensor]:
        """What comes out of block `number` for what `hidden` holds, heard by `listen`."""
        args, kwargs = self._how[number]
        out = []
        for hidden in self.hidden:
            if listen is None:
                made = self._blocks[number].module(hidden, *args, **kwargs)
            else:
                with listen:
                    made = self._blocks[number].module(hidden, *args, **kwargs)
            out.append(made[0] if isinstance(made, tuple) else made)
        return out
