"""Random cases for the invariants: a tiny model, a policy, a budget, and rows of tokens cut into calls."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from modicum import BudgetCache, parse_policy, policies
from modicum.kv import bank, contest, together
from modicum.kv.policies.razor import RazorAttention
from modicum.kv.store import Store
from modicum.kv.turning import NUMBERINGS
from tests import zoo
from tests.bounds import assert_same_logits, clear_margin
from tests.driver import feed
from tests.kv.profiles import give_profile


def _with_small_window(name: str, settings: dict[str, object]) -> str:
    return f"{name}(window=4)" if "window" in settings else name


BASES = tuple(_with_small_window(p.name, p.settings) for p in policies() if not p.wrapper)
"""Every registered policy that stands alone."""
WRAPPED = tuple(f"{p.name}+snapkv(window=4)" for p in policies() if p.wrapper)
"""Every registered wrapper around SnapKV."""
STACKED = (
    "fastcaote+tova",
    "caote(rows='window')+ahakv(window=4)",
    "caote(iterative=True)+keydiff",
    "adakv+h2o",
    "adakv+criticalkv+keydiff",
    "pyramidkv+adakv+criticalkv+h2o",
    "criticalkv+pyramidkv+ahakv(window=4, count='held')",
    "razor(criticalkv+h2o)",
    "razor(tova, compensate=False, share=2)",
    "manifoldkv(anchor_window=16)",
    "snapkv(window=4, over='max', group='max', floor=True)",
    "compactor(window=3, block=8)",
    "adakv+compactor(window=4)",
    "adakv+triattention(window=4)",
    "calibrated+learned",
    "caote+razor(compactor(window=4))",
)
"""Some that meet in the engine: states beside states, ragged heads and layers, several anchors."""
EVICTING = tuple(p for p in (*BASES, *WRAPPED, *STACKED) if parse_policy(p).evicts)
EVERY = (*BASES, *WRAPPED, *STACKED)


def shared(
    name: str,
    policy: str,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """`zoo.shared`, with a head profile where the policy needs one."""
    model = zoo.shared(name, dtype, attention)
    if "calibrated" in policy or "learned" in policy:
        give_profile(model, seed)
    return model


@dataclass(frozen=True)
class Case:
    """One conversation of some rows under a budget."""

    model: str
    policy: str
    budget: int
    chunk: int
    n_sink: int
    recent: int
    evict_every: int
    turns: tuple[tuple[int, ...], ...]
    """For each call, how many tokens each row says; shorter rows are padded on the left."""
    dtype: torch.dtype = torch.float32
    seed: int = 0
    positions: str = "original"
    store: str = "model"
    compile: bool | str = False
    """"auto": counts are tensors, wherever they can be, as a compiled step has them."""

    @property
    def net(self) -> PreTrainedModel:
        return shared(self.model, self.policy, self.dtype, seed=self.seed)

    def cache(self, **changes: object) -> BudgetCache:
        settings = {
            "policy": self.policy,
            "budget": self.budget,
            "chunk": self.chunk,
            "n_sink": self.n_sink,
            "recent": self.recent,
            "evict_every": self.evict_every,
            "positions": self.positions,
            "store": self.store,
            "compile": self.compile,
            "length": max(self.lengths),
        }
        return BudgetCache(self.net, **{**settings, **changes})

    @property
    def rows(self) -> int:
        return len(self.turns[0])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row in all."""
        return [sum(turn[row] for turn in self.turns) for row in range(self.rows)]

    @property
    def protected(self) -> int:
        """Newest tokens that must stay."""
        return max(self.recent, parse_policy(self.policy).window)

    def said(self, row: int) -> Tensor:
        """[n] the tokens of a row."""
        return zoo.tokens(1, self.lengths[row], seed=1000 * self.seed + row)[0]

    @property
    def batch(self) -> tuple[Tensor, Tensor | None, list[int]]:
        """ids [B, N], mask [B, N] (None without pads), and where the calls are cut."""
        ids, mask, edges, done = [], [], [0], [0] * self.rows
        lines = [self.said(row) for row in range(self.rows)]
        for turn in self.turns:
            width = max(turn)
            edges.append(edges[-1] + width)
            for row, n in enumerate(turn):
                pads = torch.zeros(width - n, dtype=torch.int64)
                words = lines[row][done[row] : done[row] + n]
                ids.append(torch.cat([pads, words]))
                mask.append(torch.cat([pads, torch.ones_like(words)]))
                done[row] += n
        whole = torch.cat([torch.stack(ids[i : i + self.rows]) for i in range(0, len(ids), self.rows)], 1)
        there = torch.cat([torch.stack(mask[i : i + self.rows]) for i in range(0, len(mask), self.rows)], 1)
        return whole, None if bool(there.all()) else there, edges[1:-1]

    def alone(self, row: int) -> tuple[Tensor, list[int]]:
        """ids [1, n] of a row, and where its calls are cut."""
        cuts, at = [], 0
        for turn in self.turns:
            at += turn[row]
            cuts.append(at)
        return self.said(row)[None], [c for c in cuts if 0 < c < at]

    @property
    def clear(self) -> float:
        """The least margin at which two routes to one result must choose alike."""
        return clear_margin(self.net, max(self.lengths), self.positions == "renumbered")

    def assert_same(self, found: Tensor, expected: Tensor) -> None:
        """Two routes to the same logits [..., V] agree to their rounding."""
        turned = self.positions == "renumbered"
        assert_same_logits(self.net, found, expected, max(self.lengths), turned)

    def run(self, cache: BudgetCache, **more: object) -> Tensor:
        """Say everything; logits [B, N, V]."""
        ids, mask, cuts = self.batch
        return feed(self.net, cache, ids, mask, cuts, **more)


@st.composite
def cases(
    draw: st.DrawFn,
    policy: str,
    models: tuple[str, ...] = zoo.ALL,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    rows: int = 3,
    fits: bool = False,
    evict_every: int = 4,
    steps: int = 6,
    stores: tuple[str, ...] = ("model",),
) -> Case:
    """A prompt of up to some 70 tokens per row, a few decode steps, a further turn, decode steps.

    stores: few bits round two routes to one result apart, so only tests of one route have them.
    fits: nothing has to go anywhere, whatever the layer or head. Rows differ in length, and may be empty in a
    turn; not where the model has windows, which count pads.
    """
    # Examples are the same for every policy, so each begins with another model.
    first = zlib.crc32(policy.encode()) % len(models)
    model = draw(st.sampled_from(models[first:] + models[:first]))
    windowed = any(layer.window for layer in BudgetCache(zoo.shared(model), budget=64).shape.layers)
    count = draw(st.integers(1, rows))
    prompt = draw(st.lists(st.integers(0 if count > 1 else 1, 70), min_size=count, max_size=count))
    later = draw(st.lists(st.integers(0, 25), min_size=count, max_size=count))
    if windowed:
        later = [max(later)] * count
    one = (1,) * count
    turns = [
        tuple(prompt),
        *[one] * draw(st.integers(0, steps)),
        tuple(later),
        *[one] * draw(st.integers(0, steps)),
    ]
    turns = [turn for turn in turns if max(turn)] or [one]
    n_sink, recent = draw(st.integers(0, 4)), draw(st.integers(0, 6))
    every = draw(st.integers(1, evict_every))
    made = parse_policy(policy)
    stores = tuple(s for s in stores if made.is_rotation_invariant or not Store(s).is_rotated)
    least = max(1, n_sink + max(recent, made.window)) + every - 1
    if isinstance(made, RazorAttention):
        least += made.compensate
    # CAOTE's scores are ranks then: they do not show that two keys are equally far from their mean.
    budget = least + draw(st.integers(3 * ("iterative" in policy), 20))
    longest = 10 + max(sum(turn[row] for turn in turns) for row in range(count))
    if fits or not made.evicts:
        budget = least + longest * (25 if isinstance(made, RazorAttention) or "pyramid" in policy else 1)
    return Case(
        model,
        policy,
        budget,
        draw(st.integers(1, 40)),
        n_sink,
        recent,
        every,
        tuple(turns),
        draw(st.sampled_from(dtypes)),
        draw(st.integers(0, 9)),
        draw(st.sampled_from(NUMBERINGS)),
        draw(st.sampled_from(stores)),
        draw(st.sampled_from((False, "auto"))),
    )


@dataclass
class Margin:
    """How close the closest choice was, beside the scores' size.

    Zeros are equal on whatever route, and so are scores clamped at a floor (`ties`): no close choices.
    """

    ties: bool = False
    least: float = math.inf

    def note(self, score: Tensor, keep: Tensor) -> None:
        """score, keep [..., N]: what was kept and let go, head by head."""
        for line, stays in zip(score.flatten(0, -2), keep.flatten(0, -2), strict=True):
            kept, gone = line[stays & line.isfinite()], line[~stays & line.isfinite()]
            if len(kept) and len(gone):
                low, high = float(kept.min()), float(gone.max())
                if low != high or not (self.ties or low == 0.0):
                    spread = float(line[line.isfinite()].max() - line[line.isfinite()].min())
                    size = max(abs(low), abs(high), 0.01 * spread)
                    self.least = min(self.least, (low - high) / size)


@contextmanager
def margins(policy: str) -> Iterator[Margin]:
    """Watch the engine choose.

    Two routes to one result round differently; where a choice hangs on the last bits, they may part, and
    nothing is wrong.
    """
    margin = Margin(ties="floor" in policy)
    true_best, true_worst, true_compete = bank.best, bank.worst, contest.compete

    def best(score: Tensor, positions: Tensor, count: Tensor) -> Tensor:
        keep = true_best(score, positions, count)
        margin.note(score, keep)
        return keep

    def worst(score: Tensor, positions: Tensor) -> Tensor:
        victim = true_worst(score, positions)
        margin.note(score, torch.ones_like(score, dtype=torch.bool).scatter_(-1, victim.unsqueeze(-1), False))
        return victim

    def compete(scores: list[Tensor], positions: list[Tensor], total: int, sure: int) -> list[Tensor]:
        keeps = true_compete(scores, positions, total, sure)
        margin.note(torch.cat(scores)[None], torch.cat(keeps)[None])
        for score, keep in zip(scores, keeps, strict=True):
            margin.note(score[None], keep[None])
        return keeps

    with (
        patch.object(bank, "best", best),
        patch.object(bank, "worst", worst),
        patch.object(together, "worst", worst),
        patch.object(contest, "compete", compete),
    ):
        yield margin
