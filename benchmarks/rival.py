"""A peer beside modicum on one random model: prefill, decode and peak memory. Run by kv_peers.py.

It runs in the peer's own environment, with modicum from the source tree beside it, so that both are timed in
one process, in turns. Prints one JSON object.

    PYTHONPATH=src .venv-kvpress/bin/python benchmarks/rival.py --peer kvpress
    PYTHONPATH=src .venv-kvpress/bin/python benchmarks/rival.py --peer kvpress --alone "kvpress: keydiff"
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from machine import copy_bandwidth, peak_memory
from peak import FULL
from subject import Settings, as_text, budgeted, decode, one_shot, plain, random_ids, random_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from modicum.compat import cache_kwargs

PRESSES = {"keydiff": "KeyDiffPress", "snapkv": "SnapKVPress", "knorm": "KnormPress"}
_BITS = (4, 2)


@dataclass(frozen=True)
class Rival:
    """Something that takes in a prompt and then decodes."""

    name: str
    prefill: Callable[[PreTrainedModel, Tensor], Any]
    """Takes in ids [1, n] and returns the cache."""
    fresh: Callable[[Any], Any]
    """The cache with which a block of tokens is decoded, from what `prefill` returned."""
    around: Callable[[PreTrainedModel], AbstractContextManager[Any]]
    """Entered while it decodes."""
    after: str = ""
    """The rival whose prefill is also this one's; empty: its own."""


def ours(policy: str, settings: Settings) -> Rival:
    """A policy of modicum; decoding goes on with one cache, as its length does not grow."""
    return Rival(
        f"modicum: {policy}",
        lambda model, ids: budgeted(model, as_text(ids), policy, settings)[1],
        lambda cache: cache,
        lambda model: nullcontext(),
    )


def full() -> Rival:
    """transformers' cache of the whole prompt."""
    return Rival(FULL, lambda model, ids: one_shot(model, ids)[1], lambda cache: cache, plain)


def kvpress(settings: Settings) -> list[Rival]:
    """Presses with their defaults, after which nothing is evicted; and one that also evicts as it decodes."""
    peer: Any = importlib.import_module("kvpress")

    def press(name: str) -> Any:
        ratio = 1 - (settings.budget + 1e-6) / settings.tokens
        return getattr(peer, name)(compression_ratio=ratio)

    def prefill(name: str) -> Callable[[PreTrainedModel, Tensor], Any]:
        def run(model: PreTrainedModel, ids: Tensor) -> Any:
            cache = DynamicCache()
            with plain(model), torch.no_grad(), press(name)(model):
                # The body alone, as its own pipeline has it.
                model.model(ids, **cache_kwargs(model.model, cache))
            held = cache.layers[0].keys.shape[2]
            if held != settings.budget:
                raise SystemExit(f"{name} keeps {held} tokens, wanted were {settings.budget}")
            return cache

        return run

    def bounded(name: str) -> Callable[[PreTrainedModel], AbstractContextManager[Any]]:
        # Its window must be shorter than the tokens between two evictions.
        base = getattr(peer, name)(**({"window_size": settings.block // 2} if name == "SnapKVPress" else {}))

        @contextmanager
        def around(model: PreTrainedModel) -> Iterator[None]:
            made = peer.DecodingPress(base, settings.block, settings.budget, settings.block)
            with plain(model), made(model):
                yield

        return around

    def half_a_block_short(cache: Any) -> Any:
        # It grows: so its length is right on average.
        n = settings.budget - settings.block // 2
        return DynamicCache([(x.keys[:, :, :n].clone(), x.values[:, :, :n].clone()) for x in cache.layers])

    rivals = []
    for policy, name in PRESSES.items():
        rivals.append(Rival(f"kvpress: {policy}", prefill(name), half_a_block_short, plain))
        first = rivals[-1]
        more = f"{first.name}, decoding too"
        rivals.append(Rival(more, first.prefill, half_a_block_short, bounded(name), first.name))
    return rivals


def quantised() -> list[Rival]:
    """transformers' quantised caches of the whole prompt."""

    def prefill(bits: int) -> Callable[[PreTrainedModel, Tensor], Any]:
        def run(model: PreTrainedModel, ids: Tensor) -> Any:
            from transformers import QuantizedCache

            cache = QuantizedCache("quanto", model.config, nbits=bits)
            with plain(model), torch.no_grad():
                model(ids, **cache_kwargs(model, cache), use_cache=True, logits_to_keep=1)
            return cache

        return run

    return [
        Rival(f"QuantizedCache, {bits} bits", prefill(bits), lambda cache: cache, plain) for bits in _BITS
    ]


def rivals(peer: str, settings: Settings) -> list[Rival]:
    """All that run in the environment of this peer, ours among them."""
    if peer == "kvpress":
        policies = [name for policy in PRESSES for name in (policy, f"{policy} /{settings.block}")]
        return [full(), *(ours(policy, settings) for policy in policies), *kvpress(settings)]
    return [full(), ours("keydiff", settings), *quantised()]


def beside(peer: str, settings: Settings) -> dict[str, Any]:
    """All rivals in turns: seconds of each prefill, seconds per token of each decode block."""
    model, found = random_model(settings.seed), rivals(peer, settings)
    ids, tokens = random_ids(settings.tokens, settings.seed), random_ids(settings.block, settings.seed + 1)
    caches: dict[str, Any] = {}
    prefills: list[dict[str, Any]] = []
    decodes: list[dict[str, Any]] = []
    for rival in found[:2]:  # transformers' and ours warm up
        rival.prefill(model, ids[:, : 2 * settings.budget])
    for number in range(max(1, settings.repeats // 2)):
        for rival in found:
            if rival.after:
                caches[rival.name] = caches[rival.after]
                continue
            caches.pop(rival.name, None)
            gc.collect()
            start = time.perf_counter()
            caches[rival.name] = rival.prefill(model, ids)
            prefills.append({"rival": rival.name, "round": number, "seconds": time.perf_counter() - start})
            print(f"prefill, round {number}: {rival.name}", file=sys.stderr, flush=True)
    for number in range(settings.repeats + 1):
        for rival in found:
            cache = rival.fresh(caches[rival.name])
            with rival.around(model):
                seconds = decode(model, cache, tokens)
            if number:  # the first round warms up
                decodes.append({"rival": rival.name, "round": number, "seconds": seconds})
        print(f"decode, round {number}", file=sys.stderr, flush=True)
    names = ("torch", "transformers", *(("kvpress",) if peer == "kvpress" else ("optimum-quanto",)))
    return {
        "rivals": [rival.name for rival in found],
        "prefill": prefills,
        "decode": decodes,
        "copy_bandwidth": copy_bandwidth(),
        "versions": {name: version(name) for name in names},
    }


def alone(name: str, peer: str, settings: Settings) -> dict[str, Any]:
    """One rival's prefill and a block of tokens, for the peak memory of its process."""
    model = random_model(settings.seed)
    [rival] = (r for r in rivals(peer, settings) if r.name == name)
    loaded = peak_memory()
    cache = rival.fresh(rival.prefill(model, random_ids(settings.tokens, settings.seed)))
    with rival.around(model):
        decode(model, cache, random_ids(settings.block, settings.seed + 1))
    return {"rival": name, "loaded": loaded, "peak": peak_memory()}


def main() -> None:
    """One JSON object on the standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peer", required=True, choices=("kvpress", "transformers"))
    parser.add_argument("--alone", metavar="RIVAL", help="only this one, for the peak of its process")
    for name in ("tokens", "budget", "chunk", "repeats", "block", "threads"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Settings(), name))
    asked = vars(parser.parse_args())
    peer, name = asked.pop("peer"), asked.pop("alone")
    settings = Settings(**asked)
    torch.set_num_threads(settings.threads)
    print(json.dumps(beside(peer, settings) if name is None else alone(name, peer, settings)))


if __name__ == "__main__":
    main()
