"""BudgetCache: what a user passes as `cache` (`past_key_values` before transformers 5.24)."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, SupportsIndex

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from modicum.errors import CacheError, InputError, ModelError, PolicyError
from modicum.kv import head_store, snapshot
from modicum.kv.arguments import check_settings
from modicum.kv.bank import Setting
from modicum.kv.budget import Budget
from modicum.kv.cache_settings import cache_settings_of
from modicum.kv.fingerprint import weight_checksums, weights_digest
from modicum.kv.head_profile import HeadProfile
from modicum.kv.heads import HeadScores
from modicum.kv.joining import why_no_graph
from modicum.kv.layer import BudgetLayer
from modicum.kv.offload import execution_device, is_offloaded
from modicum.kv.plan import Plan, budget_for, fewest, plan
from modicum.kv.policies.calibrated import Calibrated
from modicum.kv.policies.razor import RazorAttention
from modicum.kv.policy import Policy
from modicum.kv.precision import in_cache_dtype
from modicum.kv.recurrent import HybridLayer, RecurrentLayer, make_layer
from modicum.kv.registration import attach, is_attached
from modicum.kv.registry import parse_policy
from modicum.kv.residual_norms import residual_norms
from modicum.kv.rotary import rotary_of, turning_of
from modicum.kv.shape import Shape
from modicum.kv.shared import Shared, lasting
from modicum.kv.store import Store
from modicum.kv.token_regression import TokenScorer, too_large, why_none
from modicum.kv.turning import Turning, check_numbering
from modicum.kv.unwrap import unwrap


class BudgetCache(Cache):  # type: ignore[misc]  # transformers is not typed
    """A KV cache that never holds more than its budget, between calls, in prefill and in decode.

    Pass it as `cache` (as `past_key_values` before transformers 5.24) to `model(...)` or
    `model.generate(...)`; keep it for the next turn.
    Building one switches the model to our attention function (`modicum.detach` puts it back), which
    leaves its results with any other cache as they were.

    Args:
        model: a transformers causal LM whose attention goes through transformers' attention interface; bare,
            or inside of PEFT, `torch.compile` or a parallel wrapper (`kv/unwrap.py`).
        policy: a policy, or text such as "keydiff" or "caote+snapkv(window=16)".
        budget: tokens per KV head (every kind of slot counts), or a size such as "64MiB" for the whole cache
            of one sequence, or a share of `length` such as "12.5%", or a `Budget` (the settings below are
            then its own).
            Policy, budget and store of None are what the model's folder says (`modicum fit` writes one that
            does), else "auto", 2,048 tokens and "model".
        chunk: tokens taken in at a time; one layer holds that many beyond its budget while it works.
        n_sink: first tokens of a sequence that always stay.
        recent: newest tokens that always stay.
        evict_every: tokens evicted at a time in decode; the slack comes out of the budget.
        positions: "original", where the model saw each token; or "renumbered", the rank of each token among
            those held, in every head, so that no distance grows beyond the budget and a chunk, however long
            the stream (rotary models only).
        compile: let `model.generate` and `modicum.generate` compile decode steps, as one graph (captured as a
            CUDA graph where there is one). "auto" does so where it can be done and leaves it where not.
        store: "model", keys and values as the model gives them; "int8" or "fp8", in 8 bits with a scale for
            each token and head, so that as many bytes hold more tokens; "int4", in 4 bits, rotated by a
            Hadamard matrix; "k8v4", keys in 8 bits and values in 4.
        length: tokens of the text to be read, where known: what a share is a share of, and by which
            `calibrated` reads its profile. The budget holds whatever is read.

    Raises:
        BudgetError: a budget that cannot be kept, with the minimum for this model.
        PolicyError: an unknown policy or setting.
        ModelError: a model whose attention cannot be taken over, with the reason.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: str | Policy | None = None,
        budget: int | str | Budget | None = None,
        *,
        chunk: int = 512,
        n_sink: int = 4,
        recent: int = 32,
        evict_every: int = 1,
        positions: str = "original",
        store: str | None = None,
        compile: bool | Literal["auto"] = False,
        length: int | None = None,
        _slots: list[list[int]] | None = None,
    ) -> None:
        model = unwrap(model)
        default = cache_settings_of(model)
        policy = default.policy if policy is None else policy
        budget = default.budget if budget is None else budget
        store = default.store if store is None else store
        self.numbering = check_numbering(positions)
        self.store = Store(store, self.numbering == "renumbered")
        self.shape = Shape.of(model)
        self.policy, profile = _settled(model, parse_policy(policy), self.shape)
        self.budget = budget_for(
            self.policy, budget, chunk=chunk, n_sink=n_sink, recent=recent, evict_every=evict_every
        )
        self.budget = self.budget.of_text(length, fewest(self.policy, self.budget))
        self.weights = weight_checksums(model)
        """By which a saved cache recognises its model."""
        if self.store.is_coded:
            self.store.check([self.shape.layers[i] for i in self.shape.full], execution_device(model))
        self.store.check_policy(self.policy)
        # A saved cache has calibrated heads' slots itself, whatever the profile is by now.
        saved = _slots is not None and isinstance(self.policy, Calibrated)
        heads = _slots if saved else profile or _heads(model, self.policy)
        self.plan: Plan = plan(self.shape, self.policy, self.budget, heads, self.store, length)
        if not self.shape.full:
            warnings.warn(
                f"every attention layer of {type(model).__name__} has a sliding window and keeps it, so "
                "budget and policy change nothing: a BudgetCache has no use for this model",
                stacklevel=2,
            )
        self._model = weakref.ref(model)
        self.shared = Shared(model.config.get_text_config(decoder=True))
        self.shared.has_readers = any(layer.num_readers for layer in self.shape.layers)
        if self.numbering == "renumbered":
            if self.shared.has_readers:
                raise ModelError(
                    f"{type(model).__name__} has layers that read other layers' keys, which stand at their "
                    "own positions: leave positions='original'"
                )
            self.shared.turning = turning_of(model)
        if self.policy.needs_rotary:
            refused = f"{self.policy} cannot read its queries before it"
            self.shared.rotary = rotary_of(model, refused, "use another policy")
        if self.policy.replays:
            _check_replay(model, self.policy, self.shape)
        if self.policy.needs_regression and self.shape.full:
            profile = heads if isinstance(heads, HeadProfile) else _profile(model, self.policy)
            self.shared.scorer = _scorer(model, self.policy, self.shape, profile)
        self.shared.spread = len({p.device for p in model.parameters()}) > 1 or is_offloaded(model)
        self.notes: dict[str, Any] = {}
        """What a caller keeps with the cache, such as its place in a conversation: JSON values, saved too."""
        super().__init__(layers=self._build())
        self._settle_graph(compile)
        attach(model)

    def _settle_graph(self, compile: bool | Literal["auto"]) -> None:
        """Whether steps have one graph."""
        if compile not in (True, False, "auto"):
            raise InputError(f"compile is {compile!r}: give True, False or 'auto'")
        reason = why_no_graph(self.shared.layers, len(self.layers))
        if compile is True and reason is not None:
            raise PolicyError(
                f"decode cannot be compiled: {reason}. Leave compile=False, or give 'auto' to compile where "
                "it can be done"
            )
        self.shared.graphable = reason is None
        self.shared.static = bool(compile) and reason is None

    @property
    def compiled(self) -> bool:
        """Whether decode steps are to be compiled."""
        return self.shared.static

    def _build(self) -> list[Any]:
        full = self.shape.full
        by_call = sorted(full, key=lambda index: self.shape.layers[index].order)
        self.shared.last = by_call[-1] if by_call else -1
        self._hides_use_cache = any(layer.hides_use_cache for layer in self.shape.layers)
        self._first = next(i for i, shape in enumerate(self.shape.layers) if shape.kv_heads)
        self.shared.room = min((n for caps in self.plan.capacities for n in caps), default=0)
        layers = [None if s.is_full else make_layer(s, self.shared) for s in self.shape.layers]
        for index in by_call:
            shape, rank = self.shape.layers[index], full.index(index)
            setting = Setting(self.policy, self.budget, index, len(self.shape.layers))
            caps, kinds = self.plan.capacities[rank], self.plan.streaming[rank]
            kind = HybridLayer if shape.num_states else BudgetLayer
            layers[index] = layer = kind(setting, shape, caps, kinds, self.shared, self.store)
            if isinstance(layer, HybridLayer):
                layer.states = RecurrentLayer(shape.num_states, self.shared)
        return layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Called by the model's attention; see `transformers.Cache.update`."""
        update = self._update
        if torch.compiler.is_compiling() and not self.shared.in_graph(key_states.shape[2]):
            update = self._update_outside_graphs
        return update(key_states, value_states, layer_idx, *args, **kwargs)

    def _update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        if layer_idx >= len(self.layers):
            raise CacheError(
                f"layer {layer_idx} of a cache with {len(self.layers)}: the cache was built for another model"
            )
        if not is_attached(self.shared.config):
            raise CacheError("the model of this cache was detached: build a new BudgetCache for it")
        layer = self.layers[layer_idx]
        held = isinstance(layer, BudgetLayer) and layer.is_initialized
        dtype = layer.dtype if held else self.shape.dtype
        key_states, value_states = in_cache_dtype(key_states, value_states, dtype)
        if layer_idx == self._first and not torch.compiler.is_compiling():
            self._check_in_step()
            again, columns = self.shared.replayed, key_states.shape[2]
            if again and columns != 2 * again:
                raise CacheError(
                    f"a call of {columns} columns was to have {again} of them read again: give "
                    f"{2 * again}, the first {again} twice"
                )
            check_settings(kwargs.get("kwargs") or {}, self.shared.config, self._hides_use_cache)
            if key_states.dtype.itemsize > self.shape.dtype.itemsize:
                raise CacheError(
                    f"the model gives keys in {key_states.dtype}, the cache was built for {self.shape.dtype} "
                    "and its budget would not hold: build a new BudgetCache for the model as it is now"
                )
        return layer.update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def _update_outside_graphs(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return self._update(*args, **kwargs)

    @contextmanager
    def replaying(self, columns: int) -> Iterator[None]:
        """Inside, the last `columns` columns of a call are its first ones read again: they attend and are
        scored by, for a policy that `replays`, and nothing of them is held or counted as seen.

        A call then has 2 · `columns` columns, no more than `chunk`; their positions and its mask go on over
        both. `modicum.generate` and `modicum.prefill` make such calls; a loop of one's own may.

        Raises:
            CacheError: the policy has no use for it, or both readings do not fit into a chunk.
        """
        if not self.policy.replays:
            raise CacheError(f"{self.policy} does not ask for a second reading: call the model plainly")
        if not 1 <= columns <= self.budget.chunk // 2:
            raise CacheError(
                f"two readings of {columns} columns do not fit into a chunk of {self.budget.chunk}: give a "
                f"chunk of at least {2 * columns}, or fewer columns"
            )
        with ExitStack() as stack:
            model = self._model()
            if self.policy.needs_residual_norms and model is not None:
                self.shared.residual_norms = stack.enter_context(residual_norms(model))
            self.shared.replayed = columns
            try:
                yield
            finally:
                self.shared.replayed, self.shared.residual_norms = 0, {}

    def prepare(self) -> bool:
        """Make ready for a compiled call with one token of every row; False where there can be none (yet).

        `model.generate` and `modicum.generate` call it; a loop of one's own around `torch.compile` calls it
        before every step.
        """
        return self.shared.static and self.shared.enter(True) is not None

    def _check_in_step(self) -> None:
        seen = {i: layer.seen for i, layer in enumerate(self.layers) if hasattr(layer, "seen")}
        first = seen[self._first]
        late = next((i for i, n in seen.items() if n != first), None)
        if late is not None:
            raise CacheError(
                f"an earlier call was interrupted: layer {self._first} has seen {first} tokens, layer {late} "
                f"{seen[late]}. Start again with cache.reset(), or go back to a saved or copied cache"
            )

    # -- what it holds
    # -------------------------------------------------------------------------------------------

    @property
    def seen(self) -> int:
        """Tokens seen: columns, left padding included (each row's own count is `row_seen`)."""
        self.shared.tell()
        return int(self.layers[self._first].seen)

    @property
    def row_seen(self) -> tuple[int, ...]:
        """Tokens each row has seen, padding left out; empty before the first call."""
        self.shared.tell()
        if self.shared.layers:
            return self.shared.layers[0].row_seen
        return (self.seen,) * self.batch_size

    @property
    def batch_size(self) -> int:
        """Rows; 0 before the first call."""
        return int(self.layers[self._first].batch)

    @property
    def held(self) -> list[Tensor]:
        """Per layer, [B, H_kv] int: slots in use, a virtual token's included; [B, 0] for one without
        attention.
        """
        self.shared.tell()
        none = torch.zeros(self.batch_size, 0, dtype=torch.int64)
        return [getattr(layer, "held", none) for layer in self.layers]

    @property
    def most_slots(self) -> int:
        """Slots of the head that has most; where heads compete, it may get all of its layer's."""
        layers = self.plan.capacities
        compete = self.policy.head_shares() is not None
        return max((sum(caps) if compete else max(caps) for caps in layers), default=0)

    def positions(self, layer: int) -> Tensor:
        """[B, H_kv, N] int64: absolute positions of what a layer holds, in no particular order.

        -1 for an empty or virtual slot. A position counts the tokens of its row, not its padding; it is the
        original one under "renumbered" too.
        """
        self.shared.tell()
        none = torch.zeros(self.batch_size, 0, 0, dtype=torch.int64)
        return getattr(self.layers[layer], "positions", none)

    @property
    def nbytes(self) -> int:
        """Bytes of live storage: keys, values, positions, whatever the policy keeps, and the states of
        recurrent layers.
        """
        return sum(int(layer.nbytes) for layer in self.layers)

    @property
    def peak_nbytes(self) -> int:
        """Most bytes ever held, within calls too: what is stored and the chunk in hand."""
        return self.shared.peak

    @property
    def budget_nbytes(self) -> int:
        """Bytes that the budget allows between calls, for as many rows as there are (one before the
        first call).
        """
        return self.plan.nbytes * max(1, self.batch_size)

    @property
    def full_nbytes(self) -> int:
        """Bytes that transformers' cache of the tokens seen would hold: keys and values, windows cut, and the
        states of recurrent layers.
        """
        total = 0
        for s in self.shape.layers:
            held = self.seen if s.window is None else min(self.seen, s.window - 1)
            width = s.key_dim + s.stored_value_dim
            total += held * s.kv_heads * width * self.shape.dtype.itemsize + s.state_nbytes
        return total * max(1, self.batch_size)

    def check_integrity(self) -> None:
        """Check every invariant against the live storage.

        Raises:
            CacheError: the layer, the row and what is wrong.
        """
        self.shared.tell()
        self._check_in_step()
        for index, layer in enumerate(self.layers):
            wrong = layer.check()
            if wrong is not None:
                raise CacheError(f"layer {index}: {wrong}")
        if self.nbytes > self.budget_nbytes:
            raise CacheError(f"the cache holds {self.nbytes} bytes, its budget allows {self.budget_nbytes}")
        if self.nbytes != self.shared.now:
            raise CacheError(f"the cache holds {self.nbytes} bytes and has counted {self.shared.now}")

    # -- its life
    # ------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything and free the memory; the next call may have another batch size."""
        super().reset()
        self.shared.peak = self.shared.now = 0
        self.shared.forget()
        self.notes.clear()

    def copy(self) -> Self:
        """An independent copy, for instance to ask several questions of one compressed context."""
        with lasting():
            return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return twin

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        # Its configuration is how it knows its model; in another process that would be another's.
        raise CacheError(
            "a budget cache cannot be pickled: cache.save(path) writes it to a file, and "
            "BudgetCache.load(path, model) reads it for the model in another process; cache.copy() copies it"
        )

    def save(self, path: str | Path) -> None:
        """Write the cache to a file (safetensors with a JSON header); see `BudgetCache.load`."""
        self.shared.part()
        self._check_in_step()
        snapshot.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> Self:
        """Read a saved cache for the model that it was made with; going on gives what never stopping would.

        Raises:
            SnapshotError: the file is truncated, corrupted, of a newer format, or of another model.
        """
        with lasting():
            return snapshot.load(cls, Path(path), model)

    def __repr__(self) -> str:
        held = self.budget.tokens if self.budget.tokens is not None else f"{self.budget.nbytes} bytes"
        how = "" if self.numbering == "original" else f", positions={self.numbering}"
        how += f", store={self.store.name}" if self.store.is_coded else ""
        how += ", compile=True" if self.compiled else ""
        return f"BudgetCache({self.policy}, budget={held}{how}, seen={self.seen}, nbytes={self.nbytes})"


def _settled(model: PreTrainedModel, policy: Policy, shape: Shape) -> tuple[Policy, HeadProfile | None]:
    """The policy, or what it names for models without the calibration that it needs; and that calibration, if
    it was looked up.
    """
    if not isinstance(policy, Calibrated) or policy.otherwise is None:
        return policy, None
    profile = _profile(model, policy)
    has_regression = False
    if profile is not None and policy.base.needs_regression and shape.full:
        with suppress(PolicyError, ModelError):
            has_regression = _scorer(model, policy, shape, profile) is not None
    return policy.settled(profile is not None, has_regression), profile


def _heads(model: PreTrainedModel, policy: Policy) -> HeadScores | HeadProfile | None:
    """What the policy needs to know of the model's heads."""
    if isinstance(policy, RazorAttention):
        return head_store.head_scores(model) if policy.heads is None else HeadScores.load(policy.heads)
    if not isinstance(policy, Calibrated):
        return None
    found = _profile(model, policy)
    if found is None:
        raise PolicyError(
            f"{policy} needs a head profile, and there is none of these weights: make it once with "
            "modicum.calibrate(model, tokenizer), or modicum calibrate MODEL"
        )
    return found


def _check_replay(model: PreTrainedModel, policy: Policy, shape: Shape) -> None:
    """Raise unless the model's calls may have tokens that no layer keeps."""
    reason = None
    for i, layer in enumerate(shape.layers):
        if layer.num_states:
            reason = f"layer {i} keeps recurrent states, which a second reading would change"
        elif layer.num_readers or layer.is_latent:
            reason = f"layer {i} keeps latents, or is read by other layers"
        if reason is not None:
            raise ModelError(f"{policy} cannot read the chunks of {type(model).__name__} again: {reason}")


def _profile(model: PreTrainedModel, policy: Policy) -> HeadProfile | None:
    """The calibration that the policy names, or the one that is known for the model."""
    if isinstance(policy, Calibrated) and policy.profile is not None:
        given = HeadProfile.load(policy.profile)
        given.check(given.heads, weights_digest(model))
        return given
    return head_store.find_profile(model)


def _scorer(model: PreTrainedModel, policy: Policy, shape: Shape, profile: HeadProfile | None) -> TokenScorer:
    """What scores new tokens by the regression of the model's calibration."""
    name = type(model).__name__
    for index in shape.full:
        reason = why_none(shape.layers[index])
        if reason is not None:
            raise ModelError(f"{policy} cannot score the tokens of layer {index} of {name}: {reason}")
    if profile is None or profile.regression is None:
        what = "none of these weights" if profile is None else "one without it"
        raise PolicyError(
            f"{policy} needs a calibration with a regression of token scores, and there is {what}: make it "
            "once with modicum.calibrate(model, tokenizer), or modicum calibrate MODEL"
            + (f". {too_large(shape.layers)}" if too_large(shape.layers) else "")
        )
    regression = profile.regression
    regression.check(shape.layers, name)
    if not regression.is_unrotated:
        return TokenScorer(regression, None)
    refused = f"{policy} cannot undo it as its calibration has done"
    return TokenScorer(regression, Turning(rotary_of(model, refused, "calibrate it again"), model.dtype))


def use_head_scores(model: PreTrainedModel, scores: HeadScores) -> None:
    """Let RazorAttention use these scores for the model instead of probing it."""
    head_store.use_head_scores(unwrap(model), scores)
