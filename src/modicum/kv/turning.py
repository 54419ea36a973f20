"""Turning: a model's rotary embedding, undone and done again at another position.

With `positions="renumbered"` a cache keeps keys as they are before the rotary embedding. Each time they are
looked at they are turned to their rank among the tokens held: 0, 1, 2, … in the order in which they came
(Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453, section 3.2).
Distances then never grow beyond what is held, however long the stream.

The model's own modules do the turning, so each form is exact: frequencies and scaling are those of its
`rotary_emb`, the arrangement of pairs is that of its `apply_rotary_pos_emb`. What a model does is not taken
on trust: one token is shown to it at two positions, and the keys of every layer must be each other's, turned.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modicum.errors import InputError, ModelError
from modicum.kv.listen import attention_through
from modicum.kv.shape import Shape

STATIC = ("default", "linear", "llama3", "yarn")
"""Kinds of RoPE whose frequencies do not hang on the length of the sequence."""

Angles = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Apply = Callable[..., Any]

NUMBERINGS = ("original", "renumbered")
_LISTENER = "modicum-turning"
_FULL = "full_attention"
_PROBES = (0, 7, 611)
"""Positions at which a token is shown; at 0 nothing is turned."""


class Turning:
    """A model's rotary embedding, in both directions.

    Args:
        angles: the model's module: (x, positions [B, n]) -> cosines and sines [B, n, R] in the dtype of x.
        apply: the function that turns queries and keys by them.
        dtype: in which the model turns.
    """

    def __init__(self, angles: Angles, apply: Apply, dtype: torch.dtype) -> None:
        self._model = angles
        self._apply = apply
        self._dtype = dtype
        self._known: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self._table: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Turning:
        """The model's, found and checked once.

        Raises:
            ModelError: the model has no rotary embedding, or one that cannot be renumbered; says why.
        """
        if model not in _found:
            _found[model] = _find(model)
        return cls(*_found[model], model.dtype)

    def grouped(self, query: Tensor, ranks: Tensor, most: int) -> Tensor:
        """The same of queries [B, H, G, m, D], a group's all at the ranks [B|1, H|1, m] of their KV head."""
        b, h, g, m, d = query.shape
        flat = ranks[:, :, None].expand(-1, -1, g, -1).flatten(1, 2)
        return self.to(query.reshape(b, h * g, m, d), ranks if ranks.shape[1] == 1 else flat, most).view(
            query.shape
        )

    def forget(self) -> None:
        """Let what was made for a call go."""
        self._known = self._table = None

    def back(self, x: Tensor, positions: Tensor) -> Tensor:
        """What x was before the model turned it: x [B, H, m, D], positions [B|1, m] -> [B, H, m, D].

        In fp32 at least, rounded to x's dtype.
        """
        if self._known is None or self._known[0] is not positions:
            self._known = positions, *self._inverse(positions)
        _, cos, sin, norm = self._known
        size = cos.shape[-1]
        turned = self._turn(x[..., :size].to(norm.dtype), cos, sin)
        still = (turned * norm).to(x.dtype)
        return still if size == x.shape[-1] else torch.cat((still, x[..., size:]), -1)

    def to(self, x: Tensor, ranks: Tensor, most: int) -> Tensor:
        """x [B, H, n, D], not turned, at ranks [B|1, H|1, n] below `most`, as the model would turn it."""
        if self._table is None or most > self._table[0].shape[0]:
            cos, sin = self._angles(torch.arange(most, device=x.device)[None])
            self._table = cos[0], sin[0]
        cos, sin = (table[ranks] for table in self._table)  # [B|1, H|1, n, R]
        size = cos.shape[-1]
        turned = self._turn(x[..., :size], cos, sin).to(x.dtype)
        return turned if size == x.shape[-1] else torch.cat((turned, x[..., size:]), -1)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines as the model makes them, [B, n, R]."""
        like = torch.empty(0, dtype=self._dtype, device=positions.device)
        cos, sin = self._model(like, positions.long())
        return cos, sin

    def _inverse(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cosines and sines that turn back, and what is to be multiplied by then, each [B|1, 1, m, R]."""
        cos, sin = (x[:, None] for x in self._angles(positions.clamp_min(0)))
        wide = torch.promote_types(cos.dtype, torch.float32)
        cos, sin = cos.to(wide), -sin.to(wide)
        # Cosines and sines may be rounded or scaled: their squares need not add up to 1.
        squares = cos.square() + sin.square()
        norm = self._turn(torch.ones_like(squares), squares, torch.zeros_like(squares))
        return cos, sin, norm.reciprocal()

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, H, n, R] turned by [B|1, H|1, n, R]. The model's function wants queries and keys: no heads
        of queries, then.
        """
        if cos.shape[1] == 1:
            turned: Tensor = self._apply(x[:, :0], x, cos[:, 0], sin[:, 0], unsqueeze_dim=1)[1]
            return turned
        rows = x.shape[0] * x.shape[1]
        cos, sin = (t.expand(*x.shape[:3], -1).reshape(rows, *t.shape[2:]) for t in (cos, sin))
        flat = x.reshape(rows, 1, *x.shape[2:])
        turned = self._apply(flat[:, :0], flat, cos, sin, unsqueeze_dim=1)[1]
        return turned.view(x.shape)


def check_numbering(positions: str) -> str:
    """The setting `positions` of a cache, if it is one.

    Raises:
        InputError: it is not.
    """
    if positions not in NUMBERINGS:
        raise InputError(f"positions is {positions!r}: choose one of {', '.join(NUMBERINGS)}")
    return positions


def fresh_ranks(live: Sequence[int], length: int, valid: Tensor | None, device: torch.device) -> Tensor:
    """Ranks of a piece's tokens, after the `live` held per row: [B|1, m]; valid [B, m], False for pads."""
    fresh = torch.arange(length, device=device)[None]
    if valid is not None:
        fresh = (valid.cumsum(1) - 1).clamp_min(0)
    if min(live) == max(live):
        return fresh + live[0]
    return fresh + torch.tensor(live, device=device)[:, None]


def held_ranks(positions: Tensor, valid: Tensor | None) -> Tensor:
    """How many tokens of its head are older than each: positions [B, H, N] -> [B, H, N] int64.

    valid: [B, H, N], False where there is no token; such places come last.
    """
    if valid is not None:
        positions = positions.masked_fill(~valid, torch.iinfo(positions.dtype).max)
    order = positions.argsort(-1)
    ranks = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, ranks)


def query_ranks(at: Tensor, positions: Tensor, valid: Tensor | None) -> Tensor:
    """Ranks of queries at positions [B, R] among tokens at positions [B, H, N]: [B, H, R].

    Of a token that is held its own; of one that was let go, that of the last before it.
    """
    before = positions[:, :, None] <= at[:, None, :, None]  # [B, H, R, N]
    if valid is not None:
        before = before & valid[:, :, None]
    return (before.sum(-1) - 1).clamp_min(0)


_found: WeakKeyDictionary[PreTrainedModel, tuple[Angles, Apply]] = WeakKeyDictionary()


def _find(model: PreTrainedModel) -> tuple[Angles, Apply]:
    name = type(model).__name__
    rotary = next(_rotaries(model), None)
    if rotary is None:
        raise ModelError(
            f"{name} has no rotary embedding by which its positions could be renumbered (learned tables, "
            "ALiBi, or none at all): leave positions='original'"
        )
    if rotary.kind not in STATIC:
        raise ModelError(
            f"{name} has rotary positions of the kind {rotary.kind!r}, whose frequencies change with the "
            f"length: renumbered positions serve {', '.join(STATIC)}; leave positions='original'"
        )
    keys = {at: _keys(model, at) for at in _PROBES}
    if all(torch.equal(k, old) for k, old in zip(keys[_PROBES[1]], keys[0], strict=True)):
        raise ModelError(f"{name} does not turn its keys: leave positions='original'")
    for apply in _functions(model):
        turning = Turning(rotary.angles, apply, model.dtype)
        with suppress(Exception):  # another signature: not one that serves
            if all(_serves(turning, keys, layer) for layer in Shape.of(model).full):
                return rotary.angles, apply
    raise ModelError(
        f"{name} turns its keys in a way that could not be done again (several kinds of rotary embedding, "
        "or one of its own): leave positions='original'"
    )


@dataclass(frozen=True)
class _Rotary:
    kind: str
    angles: Angles


def _rotaries(model: PreTrainedModel) -> Iterator[_Rotary]:
    """Rotary embeddings of the layers with full attention."""
    for module in model.modules():
        kind: Any = getattr(module, "rope_type", "default")
        if hasattr(module, f"{_FULL}_inv_freq"):  # one for each type of layer, as in Gemma 3
            yield _Rotary(str(kind[_FULL]), partial(module, layer_type=_FULL))
        elif hasattr(module, "inv_freq") and hasattr(module, "attention_scaling"):
            yield _Rotary(str(kind), module)


def _functions(model: PreTrainedModel) -> Iterator[Apply]:
    """What the files of the model's classes call their rotary function."""
    for module in dict.fromkeys(type(m).__module__ for m in model.modules()):
        apply = getattr(sys.modules.get(module), "apply_rotary_pos_emb", None)
        if apply is not None:
            yield apply


def _serves(turning: Turning, keys: dict[int, list[Tensor]], layer: int) -> bool:
    """Whether a layer's keys at one position are those at another, turned, and turned back."""
    first = keys[0][layer]
    plain = turning.back(first, torch.tensor([[0]], device=first.device))
    size = float(first.abs().max())
    close = size * (1e-4 if first.dtype.itemsize >= 4 else 0.03)
    for at, every in keys.items():
        key = every[layer]
        where = torch.tensor([[at]], device=key.device)
        if float((turning.to(plain, where[None], at + 1) - key).abs().max()) > close:
            return False
        if float((turning.back(key, where) - plain).abs().max()) > close:
            return False
    return True


@torch.no_grad()
def _keys(model: PreTrainedModel, at: int) -> list[Tensor]:
    """Every layer's key [1, H, 1, D] of one token that stands at a position.

    A token that is alone sees itself only, so its hidden states are the same wherever it stands.
    """
    found: list[Tensor] = []

    def listen(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        found.append(key.detach())
        group = query.shape[1] // value.shape[1]
        return value.repeat_interleave(group, dim=1).transpose(1, 2).contiguous(), None

    ids = torch.tensor([[1]], device=model.device)
    with attention_through(model, _LISTENER, listen, "shown a token"):
        model(input_ids=ids, position_ids=torch.tensor([[at]], device=model.device), use_cache=False)
    return found
