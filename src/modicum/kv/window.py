"""Sliding-window layers: they keep their window, beside the layers under the budget."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from modicum.kv.gradients import without_backward
from modicum.kv.layer import refuse_crop
from modicum.kv.layer_shape import LayerShape
from modicum.kv.precision import without_autocast
from modicum.kv.shared import Shared


class WindowLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]  # transformers is not typed
    """A sliding-window layer: transformers' own, its storage cut to the window after each call."""

    is_croppable = False
    keys: Tensor
    values: Tensor

    def __init__(self, sliding_window: int, shape: LayerShape, shared: Shared) -> None:
        super().__init__(sliding_window)
        self.shape = shape
        self.shared = shared

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        before, continues = self.kv_nbytes, self.seen > 0
        with without_autocast(key_states.device):
            keys, values = super().update(key_states, value_states)
        again = self.shared.replayed
        if again:  # columns that attend and are not kept
            self.cumulative_length -= again
            end = keys.shape[2] - again
            kept = slice(max(0, end - self.sliding_window + 1), end)
            self.keys, self.values = keys[:, :, kept], values[:, :, kept]
        # What is kept is a view of all that came: copy it, so that the rest is really freed.
        self.keys, self.values = self.keys.detach().clone(), self.values.detach().clone()
        self.shared.change(self.kv_nbytes - before)
        length = key_states.shape[2]
        self.shared.in_hand(length * (key_states[:, :, :1].nbytes + value_states[:, :, :1].nbytes))
        if continues:  # earlier tokens have no gradients
            keys, values = without_backward(keys, key_states), without_backward(values, value_states)
        return keys, values

    @property
    def batch(self) -> int:
        return self.keys.shape[0] if self.is_initialized else 0

    @property
    def kv_nbytes(self) -> int:
        """Bytes of live storage of keys and values."""
        if not self.is_initialized:
            return 0
        return int(self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes())

    @property
    def nbytes(self) -> int:
        return self.kv_nbytes

    @property
    def held(self) -> Tensor:
        held = self.keys.shape[2] if self.is_initialized else 0
        return torch.full((self.batch, self.shape.kv_heads), held, dtype=torch.int64)

    @property
    def positions(self) -> Tensor:
        """[B, H, N] columns of what is held (pads counted: a window does not know them)."""
        held = self.keys.shape[2] if self.is_initialized else 0
        line = torch.arange(self.cumulative_length - held, self.cumulative_length)
        return line.expand(self.batch, self.shape.kv_heads, held).clone()

    @property
    def seen(self) -> int:
        return int(self.cumulative_length)

    def reset(self) -> None:
        self.shared.change(-self.kv_nbytes)
        self.keys = self.values = None  # type: ignore[assignment]  # as transformers has it before the first call
        self.is_initialized = False
        self.cumulative_length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        before = self.kv_nbytes
        super().reorder_cache(beam_idx)
        self._recount(before)

    def batch_repeat_interleave(self, repeats: int) -> None:
        before = self.kv_nbytes
        super().batch_repeat_interleave(repeats)
        self._recount(before)

    def batch_select_indices(self, indices: Tensor) -> None:
        before = self.kv_nbytes
        super().batch_select_indices(indices)
        self._recount(before)

    def _recount(self, before: int) -> None:
        """Count new storage, which for a moment stood beside the old."""
        self.shared.change(self.kv_nbytes)
        self.shared.change(-before)

    def crop(self, *args: Any) -> NoReturn:
        refuse_crop()

    def activate_past_recording(self) -> NoReturn:
        refuse_crop()

    def check(self) -> str | None:
        if self.is_initialized and self.keys.shape[2] > max(self.sliding_window - 1, 0):
            return f"{self.keys.shape[2]} tokens held, the window keeps {self.sliding_window - 1}"
        return None
