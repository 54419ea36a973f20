"""What the layers of one cache share, and what they hand to the model in place of keys and values."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from modicum.errors import CacheError
from modicum.kernels import dispatch as kernels
from modicum.kv.arguments import check_positions
from modicum.kv.call import Call, read_call
from modicum.kv.filling import Filling, has_room
from modicum.kv.stack import Stack
from modicum.kv.together import Together

if TYPE_CHECKING:
    from modicum.kv.layer import BudgetLayer
    from modicum.kv.token_regression import TokenScorer
    from modicum.kv.turning import Rotary, Turning


def lasting() -> AbstractContextManager[Any]:
    """What is made inside may be written to later, even if made by a call in `torch.inference_mode`."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


OURS = -1
"""The length that a budgeted layer reports while a step is compiled, which takes plain numbers only."""


class BudgetLength(int):
    """The length a budgeted layer reports for its mask, by which our mask function knows that the mask is
    ours, and the layer that it is of.
    """

    layer: BudgetLayer
    new: int
    """Columns of this call."""


@dataclass
class Shared:
    """What the layers of one cache have in common."""

    config: Any
    """The configuration object of the model that the cache was built for."""
    last: int = -1
    """The last layer under the budget, with which a call ends."""
    room: int = 0
    """Slots of the head that has fewest: what a policy that never evicts can hold."""
    now: int = 0
    """Bytes allocated."""
    leaving: int = 0
    """Bytes that are let go when the last layer has moved."""
    peak: int = 0
    """Most bytes ever in use, a chunk in hand and both sides of a reallocation included."""
    turning: Turning | None = None
    """With which keys are renumbered; None where they keep their original positions."""
    rotary: Rotary | None = None
    """How the model turns queries and keys, where the policy needs it."""
    replayed: int = 0
    """Last columns of the call under way that are its tokens read again, and are not held."""
    residual_norms: Mapping[int, Tensor] = field(default_factory=dict)
    """Layer -> [B, n] fp32 of the call under way (`kv/residual_norms.py`), where the policy needs them."""
    scorer: TokenScorer | None = None
    """Scores of new tokens by the model's regression, where the policy needs them."""
    last_call: tuple[Any, ...] | None = None
    call: Call | None = field(default=None)
    layers: list[BudgetLayer] = field(default_factory=list)
    """Those under the budget, in order."""
    stacks: dict[tuple[Any, ...], Stack] = field(default_factory=dict)
    """Room for layers that are still to come."""
    steps: Together | None = None
    """Decode steps of all layers at once, where that is possible."""
    static: bool = False
    """Whether steps are to have one graph, whatever is held."""
    graphable: bool = False
    """Whether they can have one."""
    spread: bool = False
    """Whether the model lies on several devices, or is offloaded."""
    has_readers: bool = False
    """Whether some layers read other layers' keys and values."""
    _joint: Together | Filling | None = None  # of the step under way
    _cut: tuple[Tensor, Tensor] | None = None  # of the call under way: its mask, and without the replay's
    _mask: tuple[Tensor, Tensor] | None = None  # of the call under way: what the model was given, and [B, N]

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        # The configuration is the model's, not ours to copy: it is how the cache knows its model.
        self.part()
        twin = replace(self, last_call=None, call=None, layers=[], stacks={}, steps=None, _joint=None)
        memo[id(self)] = twin
        twin.scorer = None if self.scorer is None else self.scorer.twin()
        twin.layers = copy.deepcopy(self.layers, memo)
        return twin

    def in_graph(self, columns: int) -> bool:
        """Whether a call of so many columns is a step whose counts are tensors, which the compiler can trace.

        All else that a compiled model asks of its cache runs outside its graphs.
        """
        steps = self.steps
        return columns == 1 and self.static and steps is not None and steps.static and steps.entered

    def check_positions(self, positions: Tensor | None, mask: Tensor | None, columns: int) -> None:
        """Refuse positions of a call that do not follow the tokens seen.

        Raises:
            InputError: see `arguments.check_positions`.
        """
        first, steps = self.layers[0], self.steps
        if columns == 1:
            if first.device.type != "cpu":
                return  # each look would wait for the device
            static = steps is not None and steps.static
            seen = steps.clock.tolist() if static and steps is not None else first.row_seen
        else:
            self.tell()
            seen = first.row_seen
        check_positions(positions, mask, seen, columns)

    def joint(self, layer: BudgetLayer, mask: Tensor | None) -> Together | Filling | None:
        """The steps that one more token of every row goes through; None where each layer works by itself."""
        if torch.compiler.is_compiling():
            return self.steps if self.static else None
        if layer is self.layers[0]:
            self._joint = self._decide(mask)
        return self._joint

    def _decide(self, mask: Tensor | None) -> Together | Filling | None:
        if self.static:
            return self.enter(True)
        first = self.layers[0]
        budget, store = first.setting.budget, first.store
        decodes = store.is_coded and not (store.has_kernel and kernels.on(first.device))
        # What a layer has decoded to attend, its policy reads there and then: decoding again would cost more.
        one_by_one = (decodes and first.setting.policy.reads_slots) or budget.evict_every > 1
        if self.turning is not None:
            return None
        if mask is not None and first.device.type != "cpu" and self.graphable and not one_by_one:
            return self.enter(True)  # with counts on the device, which need not be asked what is a pad
        if mask is not None and not bool(mask[:, -1].all()):
            return None
        if any(bank.arena.live[0] < bank.arena.capacity for bank in first.banks):
            self.part()
            return Filling(self.layers) if has_room(self.layers) else None
        return None if one_by_one else self.enter(False)

    def enter(self, static: bool) -> Together | None:
        """Begin with steps of all layers at once, or go on with them; None where that cannot be."""
        if not self.layers[-1].is_initialized:
            return None
        if self.steps is None or not self.steps.fits():
            self.steps = Together.of(self.layers)
        steps = self.steps
        if steps is None:
            return None
        if steps.static and not static:
            steps.leave()
        if not (static or steps.full):
            return None
        if not steps.settled or steps.static != static:
            with lasting():
                steps.enter(static)
        return steps

    def part(self) -> None:
        """Let each layer work by itself again, with counts that the host knows."""
        if self.steps is not None:
            self.steps.leave()

    def tell(self) -> None:
        """Let the host know the counts, where a device alone has them."""
        if self.steps is not None and self.steps.static:
            self.steps.leave()

    def apart(self) -> None:
        """Forget where layers lie: their storage is another from now on."""
        self.stacks, self.steps, self._joint = {}, None, None

    def as_mask(self, padding: Tensor) -> Tensor:
        """The padding mask [B, N] in the form in which the model is to pass it on.

        A model with layers that read other layers' keys cuts queries off masks of four dimensions.
        """
        if not self.has_readers:
            return padding
        given = padding[:, None, None]
        self._mask = given, padding
        return given

    def padding_mask(self, given: Tensor | None) -> Tensor | None:
        """The padding mask [B, N] of what `as_mask` gave."""
        if self._mask is not None and given is self._mask[0]:
            return self._mask[1]
        return given

    def without_replay(self, mask: Tensor | None) -> Tensor | None:
        """The padding mask [B, N] of the columns that are held; the same tensor for all layers of a call."""
        if mask is None or not self.replayed:
            return mask
        if self._cut is None or self._cut[0] is not mask:
            self._cut = mask, mask[:, : -self.replayed]
        return self._cut[1]

    def change(self, nbytes: int) -> None:
        """Count bytes allocated (or freed, if negative)."""
        self.now += nbytes
        self.peak = max(self.peak, self.now)

    def in_hand(self, nbytes: int) -> None:
        """Note that so many bytes are held for the moment beside what is allocated."""
        self.peak = max(self.peak, self.now + nbytes)

    def read(
        self,
        before: tuple[int, ...],
        length: int,
        chunk: int,
        recent: int,
        mask: Tensor | None,
        device: torch.device,
    ) -> Call:
        """The layout of a call; worked out by its first layer and used by the others."""
        last = self.last_call
        if last is not None and last[:3] == (before, length, device) and last[3] is mask:
            assert self.call is not None
            return self.call
        self.call = read_call(before, length, chunk, recent, mask, device)
        self.last_call = (before, length, device, mask)
        return self.call

    def forget(self) -> None:
        """Let the layout of the call go: it holds a position per token, and the caller's mask."""
        self.last_call = self.call = self._mask = self._cut = None
        if self.turning is not None:
            self.turning.forget()
        if self.scorer is not None:
            self.scorer.forget()


class Handle:
    """Stands where a model expects keys and values; our attention function finds the layer in it."""

    def __init__(self, layer: BudgetLayer) -> None:
        self.layer = layer

    def __getattr__(self, name: str) -> NoReturn:
        _refuse(f"read `{name}` of")

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any) -> NoReturn:
        _refuse(f"gave {getattr(function, '__name__', 'a torch function')}")


def _refuse(did: str) -> NoReturn:
    raise CacheError(
        f"this model's attention {did} a budget cache's keys: the cache was built for another model, or the "
        "model was detached. Build the cache for this model: BudgetCache(model, …)"
    )
