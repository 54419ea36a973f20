"""BudgetCache on a real (tiny, random) Llama against the slow reference: what is kept, and every logit.

Both get the same calls: a prompt, decode steps, a second turn, more steps. After every call the positions
that each KV head of each layer holds are compared, and the logits. The engine scores in fp32 and the
reference in float64, so each test first finds ids for which no decision of the reference was nearer than
the error of such scores (`clear`): then it is no luck to agree.
"""

from __future__ import annotations

import functools
import random
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from modicum import PolicyError
from modicum.compat import cache_kwargs
from modicum.kv import head_store
from modicum.kv.cache import BudgetCache, use_head_scores
from modicum.kv.head_profile import HeadProfile
from modicum.kv.heads import HeadScores
from modicum.kv.token_regression import TokenRegression
from tests.bounds import LAMBDA, assert_within, logit_bound, network_error, softmax_bound
from tests.kv.reference import Decoder
from tests.kv.reference_methods import (
    H2O,
    TOVA,
    AhaKV,
    Compactor,
    Full,
    KeyDiff,
    Knorm,
    Learned,
    Method,
    OBCache,
    Random,
    Replay,
    Rules,
    SnapKV,
    StreamingLLM,
    TriAttention,
)
from tests.kv.reference_wrappers import CAOTE, AdaKV, CriticalKV, PyramidKV, RazorAttention

VOCAB = 96
SEEDS = 80
"""Ids to try. About one in three leaves every one of some hundred decisions clear."""

ECHO = ((0.1, 0.7), (0.2, 0.3))
INDUCTION = ((0.4, 0.3), (0.2, 0.6))


_RNG = torch.Generator().manual_seed(3)
REGRESSION = TokenRegression(
    {i: torch.randn(2 * 2 * (8 + 1), 2, generator=_RNG).half() for i in range(2)},
    {i: torch.randn(2, generator=_RNG) for i in range(2)},
    is_unrotated=True,
)


class ExactNorm(nn.Module):
    """RMSNorm in the dtype of its input; that of transformers goes through fp32."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class ExactRotary(nn.Module):
    """RoPE's cosines and sines in float64; transformers' are fp32."""

    attention_scaling = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.inv_freq = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = (position_ids[..., None] * self.inv_freq).repeat(1, 1, 2)
        return angle.cos(), angle.sin()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCAB,
        initializer_range=0.25,  # large enough that attention is far from uniform
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).double().eval()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(parent, name, ExactNorm(child.weight + 0.3 * torch.randn_like(child.weight)))
    model.model.rotary_emb = ExactRotary()
    use_head_scores(model, HeadScores(ECHO, INDUCTION))
    alike = (((0.5, 0.5), (0.5, 0.5)),)
    head_store.use_profile(model, HeadProfile((0.5,), alike, regression=REGRESSION))
    return model


@functools.cache
def clear(model: LlamaForCausalLM) -> float:
    """The least relative gap between scores that are to be told apart: twice the error of a score in fp32.

    A score is a sum of attention weights of the model's own queries and keys, times or over some norms.
    """
    longest = {"q_proj": 0.0, "k_proj": 0.0}
    hooks = []
    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        if kind in longest:

            def note(_: nn.Module, __: Any, out: Tensor, kind: str = kind) -> None:
                longest[kind] = max(longest[kind], float(out.unflatten(-1, (-1, 8)).norm(dim=-1).max()))

            hooks.append(module.register_forward_hook(note))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model(torch.stack([torch.randperm(VOCAB, generator=rng) for _ in range(8)]))
    for hook in hooks:
        hook.remove()
    query, key = (torch.tensor([[longest[kind]]]) for kind in ("q_proj", "k_proj"))
    # As of vectors with 8 entries each.
    error = logit_bound(torch.float32, query.expand(1, 8) / 8**0.5, key.expand(1, 8) / 8**0.5, 8**-0.5)
    return 2 * softmax_bound(VOCAB, torch.float32, error)


@dataclass(frozen=True)
class Setup:
    """A budget, and the calls: tokens per row, one tuple per call. Rows are padded on the left."""

    rules: Rules
    calls: tuple[tuple[int, ...], ...]
    twice: bool = False
    """Whether calls of several columns are read again (`BudgetCache.replaying`)."""

    def is_twice(self, call: int) -> bool:
        return self.twice and max(self.calls[call]) > 1


def script(*parts: tuple[tuple[int, ...], int]) -> tuple[tuple[int, ...], ...]:
    """Calls, each so many times."""
    return tuple(call for call, times in parts for _ in range(times))


SETUPS = {
    # the prompt in one bare call: a rest, then whole chunks
    "long call": Setup(
        Rules(budget=16, chunk=6, n_sink=2, recent=4),
        script(((38,), 1), ((1,), 20), ((7,), 1), ((1,), 3)),
    ),
    # chunks longer than the budget, calls that are no whole chunks, several tokens let go at a time
    "slack": Setup(
        Rules(budget=15, chunk=17, n_sink=0, recent=3, evict_every=4),
        script(((19,), 1), ((5,), 1), ((1,), 21), ((9,), 1), ((1,), 6)),
    ),
    # two rows, the second shorter in every call of several tokens; it also sits a step out
    "padded": Setup(
        Rules(budget=14, chunk=5, n_sink=3, recent=1),
        script(((31, 18), 1), ((4, 2), 1), ((1, 1), 10), ((1, 0), 1), ((1, 1), 4), ((9, 3), 1), ((1, 1), 3)),
    ),
    # as above with slack; each row once has a single token of a piece in which the other has several or none
    "padded slack": Setup(
        Rules(budget=15, chunk=4, n_sink=1, recent=4, evict_every=3),
        script(((22, 12), 1), ((1, 1), 9), ((5, 4), 1), ((1, 1), 2), ((8, 5), 1), ((3, 2), 1), ((1, 1), 4)),
    ),
    # pieces of one token, budgets with next to no choice (window 6), a row that begins when others are full
    "late row": Setup(
        Rules(budget=13, chunk=1, n_sink=4, recent=2, evict_every=2),
        script(((17, 14, 0), 1), ((1, 1, 1), 3), ((2, 1, 9), 1), ((1, 1, 1), 5)),
    ),
}

SNAP = "snapkv(window=6, kernel=3)"


def snap(window: int = 6, kernel: int = 3, **settings: Any) -> SnapKV:
    return SnapKV(window, kernel, **settings)


def learned() -> Learned:
    parts = (REGRESSION.weights, REGRESSION.intercepts)
    return Learned(*({i: x.double().numpy() for i, x in part.items()} for part in parts))


def razor(base: Method, *settings: Any) -> RazorAttention:
    return RazorAttention(base, (ECHO, INDUCTION), *settings)


POLICIES: dict[str, Callable[[], Method]] = {
    "streamingllm": StreamingLLM,
    "random": Random,
    "random(seed=11)": lambda: Random(11),
    "knorm": Knorm,
    "keydiff": KeyDiff,
    "manifoldkv": lambda: KeyDiff("l2"),
    "keydiff(anchor_window=20)": lambda: KeyDiff("cosine", 20),
    "keydiff(metric='l2', anchor_window=24)": lambda: KeyDiff("l2", 24),
    "tova": TOVA,
    "tova(heads='each')": lambda: TOVA("each"),
    "h2o": H2O,
    SNAP: snap,
    "snapkv(window=6, kernel=5, pooling='max')": lambda: snap(6, 5, pooling="max"),
    "snapkv(window=4, kernel=3, group='max', over='max', floor=True)": lambda: snap(
        4, 3, group="max", over="max", floor=True
    ),
    "snapkv(window=5, kernel=1, floor=True)": lambda: snap(5, 1, floor=True),
    "ahakv(window=6, kernel=3)": lambda: AhaKV(6, 3),
    "ahakv(window=6, kernel=5, count='held', group='max')": lambda: AhaKV(6, 5, 0.0, "held", "max"),
    "ahakv(window=3, kernel=1, min_gain=1)": lambda: AhaKV(3, 1, 1.0),
    "obcache(window=6)": lambda: OBCache(6),
    "obcache(window=4, kernel=3, pooling='max', group='max')": lambda: OBCache(4, 3, "max", "max"),
    "compactor(window=6)": lambda: Compactor(window=6),
    "compactor(window=3, block=4, kernel=1, ridge=0.1)": lambda: Compactor(4, 3, 1, 0.1),
    "compactor(window=4, block=7, blending=0.5)": lambda: Compactor(7, 4, blending=0.5),
    "replay(window=4)": lambda: Replay(4),
    "learned": learned,
    "adakv+learned": lambda: AdaKV(learned()),
    "criticalkv+learned": lambda: CriticalKV(learned()),
    "razor(learned, echo=0.25, induction=0)": lambda: razor(learned(), 0.25, 0),
    "caote+compactor(window=4)": lambda: CAOTE(Compactor(window=4)),
    "adakv+compactor(window=5)": lambda: AdaKV(Compactor(window=5)),
    "razor(compactor(window=4), echo=0.25, induction=0)": lambda: razor(Compactor(window=4), 0.25, 0),
    "triattention(window=4)": lambda: TriAttention(4),
    "triattention(window=1, group='mean')": lambda: TriAttention(1, "mean"),
    "adakv+triattention(window=3)": lambda: AdaKV(TriAttention(3)),
    "razor(triattention(window=4), echo=0.25, induction=0)": lambda: razor(TriAttention(4), 0.25, 0),
    f"caote+{SNAP}": lambda: CAOTE(snap()),
    "caote+tova": lambda: CAOTE(TOVA()),
    "caote+h2o": lambda: CAOTE(H2O()),
    "caote+keydiff": lambda: CAOTE(KeyDiff()),
    f"fastcaote+{SNAP}": lambda: CAOTE(snap(), fast=True),
    "fastcaote+tova": lambda: CAOTE(TOVA(), fast=True),
    "fastcaote+h2o": lambda: CAOTE(H2O(), fast=True),
    "fastcaote(x_over='held')+keydiff": lambda: CAOTE(KeyDiff(), x_over="held", fast=True),
    f"caote(iterative=True)+{SNAP}": lambda: CAOTE(snap(), iterative=True),
    "caote(iterative=True)+tova": lambda: CAOTE(TOVA(), iterative=True),
    "caote(iterative=True)+keydiff": lambda: CAOTE(KeyDiff(), iterative=True),
    "fastcaote(iterative=True, group='mean')+h2o": lambda: CAOTE(H2O(), "mean", iterative=True, fast=True),
    f"caote(rows='window', group='max')+{SNAP}": lambda: CAOTE(snap(), "max", rows="window"),
    "fastcaote(rows='window', x_over='evictable')+ahakv(window=4)": lambda: CAOTE(
        AhaKV(4, 5), rows="window", x_over="evictable", fast=True
    ),
    "caote+snapkv(window=4, group='max', floor=True)": lambda: CAOTE(snap(4, 5, floor=True)),
    f"criticalkv+{SNAP}": lambda: CriticalKV(snap()),
    "criticalkv(share=0.6, eps=0.01)+keydiff": lambda: CriticalKV(KeyDiff(), 0.6, 0.01),
    "criticalkv+h2o": lambda: CriticalKV(H2O()),
    f"pyramidkv(beta=4)+{SNAP}": lambda: PyramidKV(snap(), 4),
    "pyramidkv+tova": lambda: PyramidKV(TOVA()),
    f"adakv+{SNAP}": lambda: AdaKV(snap()),
    "adakv(safeguard=0.75)+keydiff": lambda: AdaKV(KeyDiff(), 0.75),
    "adakv(safeguard=0)+h2o": lambda: AdaKV(H2O(), 0.0),
    "adakv+caote+tova": lambda: AdaKV(CAOTE(TOVA())),
    "adakv+criticalkv+ahakv(window=4)": lambda: AdaKV(CriticalKV(AhaKV(4, 5))),
    f"adakv+pyramidkv(beta=3)+{SNAP}": lambda: AdaKV(PyramidKV(snap(), 3)),
    "razor(echo=0.25, induction=0.25, share=2)": lambda: razor(KeyDiff(), 0.25, 0.25, 2),
    "razor(echo=0, induction=0.5, share=5, compensate=False)": lambda: razor(KeyDiff(), 0, 0.5, 5, False),
    f"razor({SNAP}, echo=0.25, induction=0.01, share=1.5)": lambda: razor(snap(), 0.25, 0.01, 1.5),
    "razor(h2o, echo=0.25, induction=0)": lambda: razor(H2O(), 0.25, 0),
    "razor(echo=1)": lambda: razor(KeyDiff(), 1.0),
}


def drawn(rng: random.Random, method: Method) -> Setup:
    """Any budget that holds what the method needs, any calls."""
    n_sink, recent, evict_every = rng.randint(0, 4), rng.randint(0, 6), rng.choice([1, 1, 2, 3, 5])
    least = max(1, n_sink + max(recent, method.protects)) + evict_every - 1
    budget = least + getattr(method, "compensate", False) + rng.choice([0, 1, 2, 3, 5, 8, 12])
    rules = Rules(budget, rng.choice([1, 2, 3, 4, 5, 7, 8, 11, 16, 64]), n_sink, recent, evict_every)
    rows, calls = rng.choice([1, 1, 2, 3]), []
    left = [VOCAB] * rows
    for _ in range(rng.randint(3, 24)):
        long, absent = rng.choice([1, 1, 1, 4, 12, 30]), 0.1 * (rows > 1)
        call = [0 if rng.random() < absent else min(rng.randint(1, long), n) for n in left]
        if any(call):
            left = [n - c for n, c in zip(left, call, strict=True)]
            calls.append(tuple(call))
    return Setup(rules, tuple(calls))


@dataclass
class After:
    """The reference after one call: of each row, the call's logits and what each layer's KV heads hold."""

    logits: list[np.ndarray]
    positions: list[list[list[list[int]]]]


def error_of(method: Method) -> float:
    """The error of a method's scores, or of its base's, as a multiple of an attention weight's."""
    base = getattr(method, "base", None)
    return method.error if base is None else max(method.error, error_of(base))


def expected(
    model: LlamaForCausalLM, make: Callable[[], Method], setup: Setup
) -> tuple[list[list[list[int]]], list[After]]:
    """Ids per call and row that leave no decision near, and the reference's account of them."""
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    margin = clear(model) * error_of(make())
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        ids: list[list[list[int]]] = [[] for _ in setup.calls]
        after = [After([], [[], []]) for _ in setup.calls]
        near = False
        for row in range(len(setup.calls[0])):
            # No token twice: equal tokens have equal key norms, and in the first layer equal values.
            line = [int(i) for i in rng.permutation(VOCAB)]
            decoder = Decoder(weights, 2, 8, make(), setup.rules)
            for call, counts in enumerate(setup.calls):
                near = near or decoder.clarity.least <= margin
                if near:
                    break
                part, line = line[: counts[row]], line[counts[row] :]
                ids[call].append(part)
                run = decoder.forward_twice if setup.is_twice(call) and part else decoder.forward
                after[call].logits.append(run(part))
                for layer in (0, 1):
                    after[call].positions[layer].append(decoder.positions(layer))
            near = near or decoder.clarity.least <= margin
            if near:
                break
        if not near:
            return ids, after
    raise AssertionError(f"of {SEEDS} seeds none leaves every decision clear: change the setup")


def check(model: LlamaForCausalLM, policy: str, setup: Setup, make: Callable[[], Method]) -> None:
    """Run reference and engine on the same calls and compare after each."""
    ids, after = expected(model, make, setup)
    # The virtual token's means are kept in fp32; all else is float64, as the model is.
    dtype = torch.float32 if "razor" in policy else torch.float64
    share = 2 * LAMBDA * network_error(model, VOCAB, setup.rules.renumbered, dtype)
    rules, rows = setup.rules, len(ids[0])
    cache = BudgetCache(
        model,
        policy,
        rules.budget,
        chunk=rules.chunk,
        n_sink=rules.n_sink,
        recent=rules.recent,
        evict_every=rules.evict_every,
        positions="renumbered" if rules.renumbered else "original",
        store=rules.store,
    )
    mask = torch.zeros(rows, 0, dtype=torch.long)
    for number, (call, expect) in enumerate(zip(ids, after, strict=True)):
        where = f"call {number} of {setup.calls[number]} tokens"
        width = max(len(part) for part in call)
        columns = torch.tensor([[0] * (width - len(part)) + part for part in call])
        valid = torch.tensor([[0] * (width - len(part)) + [1] * len(part) for part in call])
        mask, inputs, reading = torch.cat([mask, valid], dim=1), {}, nullcontext()
        given, told = mask, width
        if setup.is_twice(number):
            columns, given, told = torch.cat([columns] * 2, 1), torch.cat([mask, valid], 1), 2 * width
            reading = cache.replaying(width)
        if rows > 1:
            at = (given.cumsum(1) - 1).clamp_min(0)[:, -told:]
            inputs = {"attention_mask": given, "position_ids": at}
        with torch.no_grad(), reading:
            logits = model(columns, **cache_kwargs(model, cache), **inputs).logits.numpy()
        look = cache.copy()  # reading the positions of `cache` itself would put its slots in order
        look.check_integrity()
        for layer in (0, 1):
            held = look.positions(layer)
            for row in range(rows):
                got = [sorted(p for p in head.tolist() if p >= 0) for head in held[row]]
                assert got == expect.positions[layer][row], f"{where}, layer {layer}, row {row}"
        for row, part in enumerate(call):
            if part:
                found, wanted = (torch.as_tensor(x) for x in (logits[row], expect.logits[row]))
                bound = share * float(wanted.square().mean().sqrt())
                ends = range(width, told + 1, width)
                found = torch.cat([found[end - len(part) : end] for end in ends])
                assert_within(found, wanted, bound, f"{where}, row {row}: logits")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", SETUPS)
def test_engine_follows_reference(model: LlamaForCausalLM, policy: str, name: str) -> None:
    check(model, policy, SETUPS[name], POLICIES[policy])


@pytest.mark.parametrize("policy", POLICIES)
def test_engine_follows_reference_whatever_the_calls(model: LlamaForCausalLM, policy: str) -> None:
    rng = random.Random(zlib.crc32(policy.encode()))
    check(model, policy, drawn(rng, POLICIES[policy]()), POLICIES[policy])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["long call", "padded slack"])
def test_engine_follows_reference_renumbered(model: LlamaForCausalLM, policy: str, name: str) -> None:
    setup = SETUPS[name]
    check(model, policy, replace(setup, rules=replace(setup.rules, renumbered=True)), POLICIES[policy])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("store", "name", "renumbered"),
    [("int8", "slack", False), ("int8", "padded", True), ("int4", "slack", False)],
)
def test_engine_follows_reference_in_few_bits(
    model: LlamaForCausalLM, policy: str, store: str, name: str, renumbered: bool
) -> None:
    """The reference scores and attends in the model's own space, the engine in the rotated one."""
    setup = SETUPS[name]
    rules = replace(setup.rules, renumbered=renumbered, store=store)
    if store == "int4" and "triattention" in policy:
        with pytest.raises(PolicyError, match=r"'int4'.*choose store='int8'"):
            BudgetCache(model, policy, 48, store=store)
        return
    check(model, policy, replace(setup, rules=rules), POLICIES[policy])


@pytest.mark.parametrize("policy", ["keydiff", f"criticalkv+{SNAP}", "razor(h2o, echo=0.25, induction=0)"])
@pytest.mark.parametrize(("store", "renumbered"), [("int4", True), ("k8v4", False), ("k8v4", True)])
def test_engine_follows_reference_in_rows_of_few_bits(
    model: LlamaForCausalLM, policy: str, store: str, renumbered: bool
) -> None:
    setup = SETUPS["padded"]
    rules = replace(setup.rules, renumbered=renumbered, store=store)
    check(model, policy, replace(setup, rules=rules), POLICIES[policy])


@pytest.mark.parametrize("policy", [*POLICIES, "full"])
def test_room_for_all(model: LlamaForCausalLM, policy: str) -> None:
    rules = Rules(budget=40, chunk=7, n_sink=2, recent=3)
    calls = script(((17, 9), 1), ((1, 1), 3), ((6, 2), 1), ((1, 1), 2))
    check(model, policy, Setup(rules, calls), {**POLICIES, "full": Full}[policy])


TWICE = {
    # chunks of which the last is odd, steps, a second turn
    "long prompt": Setup(
        Rules(budget=16, chunk=16, n_sink=2, recent=4),
        script(((6,), 1), ((8,), 4), ((1,), 12), ((7,), 1), ((1,), 3)),
        twice=True,
    ),
    # rows of unequal length, one that sits calls out, slack
    "padded": Setup(
        Rules(budget=15, chunk=18, n_sink=1, recent=4, evict_every=3),
        script(((9, 5), 2), ((6, 9), 1), ((2, 1), 1), ((1, 1), 6), ((5, 0), 1), ((1, 1), 4)),
        twice=True,
    ),
}
READERS = {
    "replay(window=4)": lambda: Replay(4),
    "adakv+replay(window=4)": lambda: AdaKV(Replay(4)),
    "criticalkv+replay(window=3)": lambda: CriticalKV(Replay(3)),
    "razor(replay(window=4), echo=0.25, induction=0)": lambda: razor(Replay(4), 0.25, 0),
}


@pytest.mark.parametrize("policy", READERS)
@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("more", [{}, {"renumbered": True}, {"store": "int8"}, {"store": "int4"}], ids=str)
def test_engine_follows_reference_in_calls_read_twice(
    model: LlamaForCausalLM, policy: str, name: str, more: dict[str, Any]
) -> None:
    setup = TWICE[name]
    check(model, policy, replace(setup, rules=replace(setup.rules, **more)), READERS[policy])
