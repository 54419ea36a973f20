"""Recurrent layers: convolution and recurrent states (Mamba, gated delta, linear attention), kept whole.

Such a state does not grow with the text, so nothing of it is evicted; its bytes are counted. Some layers have
attention beside it (Falcon-H1). Older releases of transformers do not have these layers: each model had a
cache of its own, and such models are refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from transformers import cache_utils

from modicum.kv.layer import BudgetLayer, refuse_crop
from modicum.kv.layer_shape import LayerShape
from modicum.kv.recording import RecordingLayer
from modicum.kv.shared import Shared, lasting
from modicum.kv.window import WindowLayer


class _Missing:
    """Stands for a class that this release of transformers does not have."""


_Linear: Any = getattr(cache_utils, "LinearAttentionLayer", _Missing)
_Dummy: Any = getattr(cache_utils, "DummyLayer", _Missing)
_HybridFull: Any = getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", None)
_HybridWindow: Any = getattr(cache_utils, "LinearAttentionAndSlidingWindowAttentionLayer", None)


class EmptyLayer(_Dummy):  # type: ignore[misc]  # transformers is not typed
    """A layer that keeps nothing: of experts alone, or one that reads another layer's keys and values."""

    nbytes = 0

    def check(self) -> str | None:
        return None


class RecurrentLayer(_Linear):  # type: ignore[misc]
    """The states of a recurrent layer; transformers' own, with its bytes counted.

    Args:
        number_of_states: how many convolution and recurrent states it may keep.
        shared: the cache's.
    """

    is_croppable = False

    def __init__(self, number_of_states: int, shared: Shared) -> None:
        super().__init__(number_of_states=number_of_states)
        self.shared = shared

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def nbytes(self) -> int:
        """Bytes of live storage."""
        return sum(int(state.untyped_storage().nbytes()) for state in states_held(self))

    @property
    def batch(self) -> int:
        return next((state.shape[0] for state in states_held(self)), 0)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        before = self.nbytes
        with lasting():
            super().lazy_initialization(*args, **kwargs)
        self.shared.change(self.nbytes - before)

    def update_conv_state(self, conv_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Detached, as a state with a history would keep every earlier step's graph alive.
        full: Tensor = super().update_conv_state(conv_states.detach(), *args, **kwargs)
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state: Tensor = super().update_recurrent_state(recurrent_states.detach(), *args, **kwargs)
        return state

    def reset(self) -> None:
        """Forget everything; the next call may have another batch size."""
        self.shared.change(-self.nbytes)
        super().__init__(number_of_states=self.number_of_states)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        before = self.nbytes
        with lasting(), torch.no_grad():
            for group in (self.conv_states, self.recurrent_states):
                for key, state in group.items():
                    if state is not None:
                        group[key] = state[indices.to(state.device)]
        self.shared.change(self.nbytes)  # for a moment beside the old states
        self.shared.change(-before)

    def state_dict(self) -> dict[str, Tensor]:
        """The states by name, for a snapshot."""
        groups = {"conv": self.conv_states, "recurrent": self.recurrent_states}
        return {
            f"{name}_{key}": state
            for name, group in groups.items()
            for key, state in group.items()
            if state is not None
        }

    def load_state_dict(self, states: dict[str, Tensor]) -> None:
        """Take the states of a snapshot."""
        for name, state in states.items():
            kind, key = name.rsplit("_", 1)
            index = int(key)
            if kind == "conv":
                self.lazy_initialization(conv_states=state, state_idx=index)
                self.conv_states[index].copy_(state)
            else:
                self.lazy_initialization(recurrent_states=state, state_idx=index)
                self.recurrent_states[index].copy_(state)
            self.has_previous_state[index] = True
            self.device, self.dtype = state.device, state.dtype

    def crop(self, *args: Any) -> NoReturn:
        refuse_crop()

    def activate_past_recording(self) -> NoReturn:
        refuse_crop()

    def check(self) -> str | None:
        bad = [name for name, state in self.state_dict().items() if not bool(torch.isfinite(state).all())]
        return f"its states {', '.join(bad)} are not finite" if bad else None


class _CarriesStates:
    """Mixed into a layer with attention: recurrent states beside its keys and values."""

    states: RecurrentLayer

    if TYPE_CHECKING:
        kv_nbytes: int

    def __getattr__(self, name: str) -> Any:
        # What transformers reads of a recurrent layer is the states'.
        if name in _OF_STATES and "states" in self.__dict__:
            return getattr(self.states, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def nbytes(self) -> int:
        return self.kv_nbytes + self.states.nbytes

    def reset(self) -> None:
        self.states.reset()
        super().reset()  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.states.reorder_cache(beam_idx)
        super().reorder_cache(beam_idx)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(self.states.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def check(self) -> str | None:
        wrong: str | None = super().check()  # type: ignore[misc]
        return wrong or self.states.check()


class HybridLayer(_CarriesStates, BudgetLayer):
    """A layer with attention under the budget and recurrent states."""


class HybridWindowLayer(_CarriesStates, WindowLayer):
    """A layer with a sliding window and recurrent states."""


_OF_STATES = {
    "number_of_states",
    "conv_states",
    "recurrent_states",
    "has_previous_state",
    "is_conv_states_initialized",
    "is_recurrent_states_initialized",
    "conv_kernel_size",
    "record_past",
    "update_conv_state",
    "update_recurrent_state",
}


def make_layer(shape: LayerShape, shared: Shared) -> Any:
    """The cache layer for a layer of the model that is not under the budget."""
    if shape.window is None:
        return RecurrentLayer(shape.num_states, shared) if shape.num_states else EmptyLayer()
    if not shape.num_states:
        return WindowLayer(shape.window, shape, shared)
    layer = HybridWindowLayer(shape.window, shape, shared)
    layer.states = RecurrentLayer(shape.num_states, shared)
    return layer


def is_known(layer: Any) -> bool:
    """Whether a cache layer of transformers' keeps a window or states, or nothing, and is understood here."""
    return type(layer) in (_Linear, _HybridWindow, _Dummy)


def is_hybrid(layer: Any) -> bool:
    """Whether a cache layer of transformers' keeps states beside full attention."""
    return _HybridFull is not None and type(layer) is _HybridFull


def states_held(layer: Any) -> list[Tensor]:
    """The states that a layer keeps at the moment."""
    held = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
    return [state for state in held if state is not None]


class RecordingHybrid(_Linear, RecordingLayer):  # type: ignore[misc]
    """Notes what a layer's attention does, and keeps its states as transformers would."""

    def __init__(self, is_latent: bool, order: list[RecordingLayer], number_of_states: int = 1) -> None:
        RecordingLayer.__init__(self, is_latent, order)
        _Linear.__init__(self, number_of_states=number_of_states)

    def __deepcopy__(self, memo: dict[int, Any]) -> RecordingHybrid:
        return type(self)(self.is_latent, self.order, self.number_of_states)


if _HybridFull is not None:
    # transformers asks by this class whether a layer has states.
    for _class in (HybridLayer, HybridWindowLayer):
        cache_utils.LinearAttentionCacheLayerMixin.register(_class)
