"""What is measured: a random Llama, random tokens, and transformers' own cache beside ours."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import modicum
from modicum.compat import cache_kwargs
from modicum.kv.cache import use_head_scores
from modicum.kv.heads import probe

PRIME = "keydiff"
FLOOR = "streamingllm"
"""The policy whose score costs next to nothing: its step is what the engine itself takes."""
COMBINED = (
    "manifoldkv",
    "caote+snapkv",
    "fastcaote+tova",
    "criticalkv+snapkv",
    "pyramidkv+snapkv",
    "adakv+snapkv",
)
DEAR = ("ahakv", "razor", "snapkv", *COMBINED[1:])
"""Policies whose scores cannot be carried on from step to step."""
EVERY = 16
_VOCABULARY = 1024


COMPILED = (
    "keydiff",
    "streamingllm",
    "knorm",
    "manifoldkv",
    "h2o",
    "tova",
    "razor",
    "snapkv",
    "fastcaote+tova",
)
"""Policies whose decode step is compiled as well."""


@dataclass(frozen=True)
class Settings:
    """One run of the benchmark."""

    tokens: int = 16_384
    budget: int = 1_024
    chunk: int = 512
    repeats: int = 7
    """Rounds of decode blocks; a third as many of prefills."""
    block: int = 20
    """Tokens decoded by one contender before the next one's turn."""
    threads: int = 2
    seed: int = 0
    policies: tuple[str, ...] = ()
    compiled: tuple[str, ...] = ()

    @property
    def long_tokens(self) -> int:
        """The prompt of the second process whose peak memory is compared."""
        return 4 * self.tokens

    def budget_of(self, policy: str) -> int:
        """A full cache needs room for the whole run."""
        return self.tokens + self.block * (self.repeats + 1) if policy == "full" else self.budget


QUICK = Settings(tokens=512, budget=192, chunk=128, repeats=2, block=2)
"""Small, to see that all of it runs."""


def split(contender: str) -> tuple[str, int]:
    """ "snapkv /16" is SnapKV that lets 16 tokens go at every 16th step: the policy, and `evict_every`."""
    policy, _, every = contender.partition(" /")
    return policy, int(every or 1)


def all_policies() -> tuple[str, ...]:
    """Every registered policy that stands by itself, then some combined ones, then those that score afresh at
    each step, amortised; the one with targets first.
    """
    single = [info.name for info in modicum.policies() if not info.wrapper and info.name != PRIME]
    return (PRIME, *single, *COMBINED, *(f"{policy} /{EVERY}" for policy in DEAR))


class Numbers:
    """A tokenizer for random tokens: a text is their ids, with spaces between; other words are token 0."""

    eos_token_id = None
    pad_token_id = 0
    padding_side = "left"

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) if word.isdigit() else 0 for word in text.split()]}

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return " ".join(map(str, tokens))


def random_model(seed: int = 0) -> PreTrainedModel:
    """8 layers, hidden 512, 8 query heads over 4 KV heads of 64, intermediate 1376, fp32; random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2**20,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def random_ids(count: int, seed: int = 0) -> Tensor:
    """[1, count] token ids."""
    return torch.randint(_VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


def as_text(ids: Tensor) -> str:
    """What `Numbers` reads back as these ids."""
    return " ".join(map(str, ids[0].tolist()))


def probe_heads(model: PreTrainedModel) -> None:
    """A short probe for RazorAttention: which heads of a random model it picks does not change its speed."""
    use_head_scores(model, probe(model, tokens=64, seeds=(0,)))


def calibrate_heads(model: PreTrainedModel) -> None:
    """A short calibration, for `learned`: what it says of a random model's tokens does not change its speed.

    It is not kept in the user's folder.
    """
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, MODICUM_CACHE=folder):
        modicum.calibrate(model, Numbers(), [as_text(random_ids(128))], tokens=128)


@contextmanager
def plain(model: PreTrainedModel) -> Iterator[None]:
    """The model as transformers loads it (sdpa), while entered."""
    modicum.detach(model)
    try:
        yield
    finally:
        modicum.attach(model)


class Stored:
    """The keys and values of transformers' cache after a prompt, from which caches of any length are made."""

    def __init__(self, cache: DynamicCache) -> None:
        self._pairs = [(layer.keys, layer.values) for layer in cache.layers]

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token's keys and values."""
        return sum(k[:, :, :1].nbytes + v[:, :, :1].nbytes for k, v in self._pairs)

    def cache(self, length: int) -> DynamicCache:
        """A new cache of the first `length` tokens."""
        return DynamicCache([(k[:, :, :length], v[:, :, :length]) for k, v in self._pairs])


@torch.no_grad()
def without_a_past(model: PreTrainedModel, ids: Tensor, chunk: int) -> float:
    """Seconds for the same chunks by transformers, each forgotten at once: what is below every prefill."""
    with plain(model):
        start = time.perf_counter()
        for part in ids.split(chunk, dim=1):
            cache = DynamicCache(config=model.config)
            model(part, **cache_kwargs(model, cache), use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start


@torch.no_grad()
def one_shot(model: PreTrainedModel, ids: Tensor) -> tuple[float, DynamicCache]:
    """Prefill as transformers does it: seconds, and the cache."""
    with plain(model):
        cache = DynamicCache(config=model.config)
        start = time.perf_counter()
        model(ids, **cache_kwargs(model, cache), use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start, cache


def budgeted(
    model: PreTrainedModel, text: str, contender: str, settings: Settings
) -> tuple[float, modicum.BudgetCache]:
    """Prefill by `modicum.prefill`, in chunks: seconds, and the cache."""
    policy, every = split(contender)
    given = {"budget": settings.budget_of(policy), "chunk": settings.chunk, "evict_every": every}
    start = time.perf_counter()
    cache = modicum.prefill(model, Numbers(), text, policy=policy, **given)
    return time.perf_counter() - start, cache


@torch.no_grad()
def decode(model: PreTrainedModel, cache: Any, ids: Tensor) -> float:
    """Take in ids [1, n] one by one: seconds per token."""
    given = cache_kwargs(model, cache)
    start = time.perf_counter()
    for token in ids.split(1, dim=1):
        model(token, **given, use_cache=True)
    return (time.perf_counter() - start) / ids.shape[1]
