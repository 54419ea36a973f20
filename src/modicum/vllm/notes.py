"""Notes: what is known of each token beside its key and value, in all layers."""

from __future__ import annotations

import torch
from torch import Tensor

from modicum.kv.policy import Policy
from modicum.vllm.pages import Pages
from modicum.vllm.step import Step


class Notes:
    """A position for each slot of each head, the policy's numbers, and its sums over a request's tokens.

    Args:
        pages: of any layer; all are alike.
        group: query heads per KV head.
        requests: that may run at once.
    """

    def __init__(self, policy: Policy, pages: Pages, layers: int, group: int, requests: int) -> None:
        self.policy, self.group = policy, group
        device = pages.keys.device
        shape = (layers, pages.number, pages.heads, pages.block)
        self.positions = torch.full(shape, -1, dtype=torch.int32, device=device)
        """[L, pages, H, block] where each token stood in its request; heads let go of different ones."""
        width = policy.state_width(group)
        self.state = torch.zeros(*shape, width, device=device) if width else None
        """[L, pages, H, block, F]: the policy's numbers of each token."""
        width = policy.sum_width(pages.key_dim, pages.value_dim)
        shape = (layers, requests, pages.heads, width)
        self.sums = torch.zeros(shape, dtype=torch.float64, device=device) if width else None
        """[L, requests, H, F]: the policy's sums over what a request holds, where `summed`."""
        self.summed = torch.zeros(requests, dtype=torch.bool, device=device)

    @property
    def nbytes(self) -> int:
        there = (self.positions, self.state, self.sums, self.summed)
        return sum(t.nbytes for t in there if t is not None)

    def begin(self, step: Step, block: int) -> None:
        """Note where a step's tokens stand, in all layers at once."""
        page, slot = step.place(block)
        self.positions[:, page, :, slot] = step.position[:, None, None]

    def take_in(self, step: Step, layers: slice, key: Tensor, value: Tensor, block: int) -> None:
        """Note the policy's numbers of a step's tokens in L layers: key [L, T, H, Dk], value."""
        if self.state is None:
            return
        page, slot = step.place(block)
        state = self.policy.token_state(key.transpose(1, 2), value.transpose(1, 2), self.group, None)
        self.state[layers, page, :, slot] = state.permute(2, 0, 1, 3)  # [T, L, H, F]

    def of(self, used: Tensor, slots: int, layers: slice = slice(None)) -> tuple[Tensor, Tensor | None]:
        """Copies for R requests whose pages are used [R, P]: positions [L·R, H, slots], state [L·R, H,
        slots, F].
        """
        positions = self._of(self.positions[layers], used, slots)
        return positions, None if self.state is None else self._of(self.state[layers], used, slots)

    @staticmethod
    def _of(what: Tensor, used: Tensor, slots: int) -> Tensor:
        rows, pages = used.shape
        found = what.index_select(1, used.flatten())  # [L, R·P, H, block, ...]
        found = found.view(found.shape[0], rows, pages, *found.shape[2:]).transpose(2, 3)
        return found.flatten(3, 4).flatten(0, 1)[:, :, :slots]

    def line(self, layer: Tensor | int, page: Tensor, head: Tensor, slot: Tensor) -> Tensor:
        """Where a token's notes lie; flat."""
        _, pages, heads, block = self.positions.shape
        return (((layer * pages + page) * heads + head) * block + slot).flatten()

    def move(self, source: Tensor, target: Tensor) -> None:
        """Tokens go from some lines to others."""
        positions = self.positions.view(-1)
        positions.index_copy_(0, target, positions.index_select(0, source))
        if self.state is not None:
            state = self.state.view(-1, self.state.shape[-1])
            state.index_copy_(0, target, state.index_select(0, source))

    def write(self, line: Tensor, positions: Tensor, state: Tensor | None) -> None:
        """Note tokens in some lines [K]: positions [K], state [K, F]."""
        self.positions.view(-1).index_copy_(0, line, positions)
        if self.state is not None and state is not None:
            self.state.view(-1, self.state.shape[-1]).index_copy_(0, line, state)
