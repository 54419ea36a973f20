"""Random eviction: the baseline that any signal has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from modicum.errors import PolicyError
from modicum.kv.policy import Policy
from modicum.kv.registry import register
from modicum.kv.view import View

_LOW = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """Scramble the low 32 bits of int64 numbers (Wellons' lowbias32): a bijection with no visible pattern.

    The products wrap modulo 2^64, which leaves their low 32 bits right.
    """
    x = x & _LOW
    x = (x ^ (x >> 16)).mul_(0x7FEB352D).bitwise_and_(_LOW)
    x = (x ^ (x >> 15)).mul_(0x846CA68B).bitwise_and_(_LOW)
    return x ^ (x >> 16)


@lru_cache
def _keys(seed: int, layer: int, heads: int, device: torch.device) -> Tensor:
    """[heads, 1]: what each head draws its lots with, made once."""
    number = torch.arange(heads, device=device)
    return _mix(_mix(_mix(torch.full_like(number, seed)) + layer) + number)[:, None]


@register
@dataclass(frozen=True)
class Random(Policy):
    """s_j = u(seed, layer, KV head, position) in [0, 1), a hash instead of a random stream.

    So a token's lot is drawn once: chunks, batching and slots cannot change which tokens stay, and each token
    that comes is as likely to stay as each that is held.
    """

    name: ClassVar[str] = "random"
    title: ClassVar[str] = "Random"
    paper: ClassVar[str] = "—"
    summary: ClassVar[str] = (
        "Keeps tokens by seeded random scores of each layer, head and position; a baseline."
    )

    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed <= _LOW:
            raise PolicyError(f"random: seed is {self.seed!r}; it must be a whole number from 0 to {_LOW}")

    @property
    def is_rotation_invariant(self) -> bool:
        return True

    @property
    def reads_slots(self) -> bool:
        return False

    def score(self, view: View) -> Tensor:
        key = _keys(self.seed, view.layer, view.positions.shape[1], view.positions.device)
        # 24 bits are what fp32 holds exactly.
        return (_mix(view.positions ^ key) >> 8).float() / 2**24
