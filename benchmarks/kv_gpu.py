"""Speed and memory of modicum's caches on a GPU, beside transformers' own, in one run.

A model of random weights in the shape of Llama-3.1-8B (bf16) decodes under a budget after 8K, 32K and 128K
tokens, at batch 1, 8 and 32: eager, compiled and with slots in 8 bits, beside DynamicCache and beside a
compiled StaticCache of the budget's length; then prefill, and the kernels against a copy of the same memory.
`--small` is the same on any machine, in little: a CPU runs the kernels through Triton's interpreter.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

import modicum
from modicum.compat import cache_kwargs
from modicum.kernels import dispatch
from modicum.kv.codec import Codec

_MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """One run."""

    layers: int = 32
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256
    contexts: tuple[int, ...] = (8192, 32768, 131072)
    batches: tuple[int, ...] = (1, 8, 32)
    compiled_batches: tuple[int, ...] = (1, 32)
    budget: int = 2048
    chunk: int = 4096
    steps: int = 12
    rounds: int = 3
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    policies: tuple[str, ...] = ("keydiff", "tova", "snapkv", "manifoldkv")

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token's keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_dim * torch.finfo(self.dtype).bits // 8


SMALL = Settings(
    layers=2,
    hidden=64,
    intermediate=96,
    heads=4,
    kv_heads=2,
    vocabulary=256,
    contexts=(160,),
    batches=(1, 2),
    compiled_batches=(),
    budget=48,
    chunk=32,
    steps=2,
    rounds=1,
    device="cpu",
    dtype=torch.float32,
    policies=("keydiff", "tova"),
)


class Clock:
    """Times of work on a device: the median of several, each after all before it is done."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def once(self, work: Callable[[], Any]) -> float:
        """Seconds."""
        self.sync()
        start = time.perf_counter()
        work()
        self.sync()
        return time.perf_counter() - start

    def per_call(self, work: Callable[[], Any], calls: int, rounds: int) -> list[float]:
        """Seconds a call, of each round; one call before them is a warm-up."""
        work()
        return [self.once(lambda: [work() for _ in range(calls)]) / calls for _ in range(rounds)]


def random_model(s: Settings) -> PreTrainedModel:
    """Random weights; nothing here depends on what they mean."""
    config = LlamaConfig(
        vocab_size=s.vocabulary,
        hidden_size=s.hidden,
        intermediate_size=s.intermediate,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        max_position_embeddings=2**20,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(s.dtype)
    try:
        with torch.device(s.device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


# -- the kernels
# --------------------------------------------------------------------------------------------------------


def copy_rate(s: Settings, clock: Clock) -> float:
    """Bytes a second of a large copy on the device, reads and writes counted."""
    size = 2**30 if s.device == "cuda" else 2**24
    a, b = (torch.empty(size, dtype=torch.uint8, device=s.device) for _ in range(2))
    times = clock.per_call(lambda: b.copy_(a), 10, 5)
    return 2 * size / statistics.median(times)


def kernels(s: Settings, clock: Clock, rate: float) -> list[dict[str, Any]]:
    """The decode-attention kernel alone: what it reads over its time, beside a copy's rate."""
    found = []
    group, d = s.heads // s.kv_heads, s.head_dim
    for batch in s.batches:
        for name, store, extra in (
            ("attention", "model", {}),
            ("attention + probe", "model", {"probe": True}),
            ("attention + logits", "model", {"logits": True}),
            ("attention, int8 slots", "int8", {}),
            ("attention, fp8 slots", "fp8", {}),
        ):
            slots = s.budget + 1
            form = Codec(store)
            # Several copies, one after the other, so that none is still in the chip's cache.
            pool = []
            for _ in range(
                max(
                    1,
                    min(
                        16, (512 * _MIB if s.device == "cuda" else 1) // (batch * s.kv_heads * slots * d * 4)
                    ),
                )
            ):
                x = torch.randn(2, batch, s.kv_heads, slots, d, device=s.device).to(s.dtype)
                pool.append((form.encode(x[0]), form.encode(x[1])))
            q = torch.randn(batch, s.kv_heads, group, d, device=s.device).to(s.dtype)
            count = torch.full((batch, s.kv_heads), slots, dtype=torch.int32, device=s.device)
            probe = torch.randn(batch, s.kv_heads, d, device=s.device) if extra.get("probe") else None
            turn = iter(range(10**9))

            def work(pool=pool, q=q, count=count, probe=probe, turn=turn, store=store, extra=extra) -> None:  # type: ignore[no-untyped-def]
                k, v = pool[next(turn) % len(pool)]
                dispatch.decode(
                    q, k, v, count, d**-0.5, form=store, probe=probe, logits=extra.get("logits", False)
                )

            # Captured, so that what is timed is the kernels and not the launching of them.
            times = _captured(work, len(pool), clock, s) if s.device == "cuda" else clock.per_call(work, 2, 2)
            read = pool[0][0].nbytes + pool[0][1].nbytes
            seconds = statistics.median(times)
            found.append(
                {
                    "kernel": name,
                    "batch": batch,
                    "us": 1e6 * seconds,
                    "gbs": read / seconds / 1e9,
                    "of_copy": read / seconds / rate,
                }
            )
            del pool
    return found


def _captured(work: Callable[[], None], number: int, clock: Clock, s: Settings) -> list[float]:
    for _ in range(3):
        work()
    clock.sync()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(number):
            work()
    return [t / number for t in clock.per_call(graph.replay, max(1, 64 // number), 5)]


# -- the model
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def prefill(model: PreTrainedModel, cache: Any, ids: Tensor, chunk: int) -> None:
    """Take ids [B, n] in, so many at a time."""
    first = ids.shape[1] % chunk
    for start in ([0] if first else []) + list(range(first, ids.shape[1], chunk)):
        stop = first if start == 0 and first else start + chunk
        model(ids[:, start:stop], **cache_kwargs(model, cache), use_cache=True, logits_to_keep=1)


def budgeted(model: PreTrainedModel, s: Settings, policy: str, **more: Any) -> modicum.BudgetCache:
    return modicum.BudgetCache(model, policy, s.budget, chunk=s.chunk, n_sink=4, recent=32, **more)


class Decoder:
    """One token after the other; the graph, if there is one, is captured beforehand."""

    def __init__(self, model: PreTrainedModel, cache: Any, seen: int, batch: int, run: Any = None) -> None:
        self.model, self.cache, self.run = model, cache, run or model
        self.ids = torch.randint(model.config.vocab_size, (batch, 1), device=model.device)
        self.at = torch.full((1, 1), seen, device=model.device)
        self.ours = isinstance(cache, modicum.BudgetCache)
        self.given = cache_kwargs(model, cache)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        if self.run is not self.model:
            torch.compiler.cudagraph_mark_step_begin()
            if self.ours:
                self.cache.prepare()
        out = self.run(
            input_ids=self.ids,
            **self.given,
            position_ids=self.at,
            use_cache=True,
            return_dict=True,
        )
        self.at += 1
        return out.logits


def timed(decoder: Decoder, s: Settings, clock: Clock, warm: int = 3) -> dict[str, Any]:
    """Milliseconds a token: median, least and most of the rounds."""
    for _ in range(warm):
        decoder()
    times = [1e3 * t for t in clock.per_call(decoder, s.steps, s.rounds)]
    return {"ms": statistics.median(times), "least": min(times), "most": max(times)}


def random_dynamic(s: Settings, batch: int, length: int) -> DynamicCache:
    """transformers' cache of so many tokens."""
    shape = (batch, s.kv_heads, length, s.head_dim)
    return DynamicCache(
        [tuple(torch.randn(shape, device=s.device, dtype=s.dtype) for _ in "kv") for _ in range(s.layers)]
    )


def random_static(model: PreTrainedModel, s: Settings, batch: int, length: int) -> StaticCache:
    """transformers' static cache, full but for the steps to come."""
    cache = StaticCache(config=model.config, max_cache_len=length + 128)
    shape = (batch, s.kv_heads, length, s.head_dim)
    for layer in range(s.layers):
        x = torch.randn(shape, device=s.device, dtype=s.dtype)
        cache.update(x, x, layer)
    return cache


def _free(s: Settings) -> None:
    gc.collect()
    if s.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(s: Settings) -> float | None:
    return torch.cuda.max_memory_allocated() / _MIB if s.device == "cuda" else None


class Bench:
    """All of it, in the order of what matters most, so that a run that is cut short has that."""

    def __init__(self, s: Settings, out: Path | None, limit: float) -> None:
        self.s, self.out, self.limit = s, out, limit
        self.started = time.perf_counter()
        self.clock = Clock(s.device)
        self.console = Console(width=150)
        self.raw: dict[str, Any] = {
            "date": datetime.now().astimezone().date().isoformat(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if s.device == "cuda" else "CPU, Triton interpreted",
            "settings": {k: str(v) if isinstance(v, torch.dtype) else v for k, v in asdict(s).items()},
            "rows": [],
        }

    def keep(self, **row: Any) -> None:
        row["at"] = round(time.perf_counter() - self.started, 1)
        self.raw["rows"].append(row)
        print(json.dumps(row), flush=True)
        if self.out is not None:
            self.out.write_text(json.dumps(self.raw, indent=1) + "\n")

    def attempt(self, what: str, work: Callable[[], None]) -> None:
        """Go on after one that fails: its row says why."""
        if time.perf_counter() - self.started > self.limit:
            self.keep(what=what, skipped="out of time")
            return
        try:
            work()
        except Exception as error:  # a benchmark goes on and tells
            self.keep(what=what, failed=f"{type(error).__name__}: {str(error)[:300]}")
        _free(self.s)

    def run(self) -> None:
        s = self.s
        self.raw["copy_gbs"] = copy_rate(s, self.clock) / 1e9
        print(f"copy {self.raw['copy_gbs']:.0f} GB/s", flush=True)
        self.attempt("kernels", self._kernels)
        model = random_model(s)
        self.raw["weights_mib"] = sum(p.nbytes for p in model.parameters()) / _MIB
        caches: dict[str, Any] = {}
        torch._dynamo.config.recompile_limit = 64
        # cuDNN's attention is planned anew for each length, which a growing cache has at every step: without
        # it transformers' caches are several times as fast here.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.attempt("prefill", lambda: self._prefill(model, caches))
        for batch in s.compiled_batches:
            self.attempt(f"compiled static {batch}", lambda b=batch: self._static(model, b))
            self.attempt(
                f"compiled ours {batch}", lambda b=batch: self._ours(model, caches, b, True, "model")
            )
        for batch in s.batches:
            self.attempt(f"eager {batch}", lambda b=batch: self._ours(model, caches, b, False, "model"))
            self.attempt(f"dynamic {batch}", lambda b=batch: self._dynamic(model, b))
        if s.compiled_batches:
            last = s.compiled_batches[-1]
            self.attempt("compiled int8", lambda: self._ours(model, caches, last, True, "int8"))
        self.attempt("policies", lambda: self._policies(model))
        self.attempt("one-shot", lambda: self._one_shot(model))
        print(f"{time.perf_counter() - self.started:.0f} s")

    def _kernels(self) -> None:
        for row in kernels(self.s, self.clock, 1e9 * self.raw["copy_gbs"]):
            self.keep(what="kernel", **row)

    def _prefill(self, model: PreTrainedModel, caches: dict[str, Any]) -> None:
        s = self.s
        warm = torch.randint(s.vocabulary, (1, 2 * s.chunk), device=s.device)
        prefill(model, budgeted(model, s, "keydiff"), warm, s.chunk)
        for context in s.contexts:
            _free(s)
            ids = torch.randint(s.vocabulary, (1, context), device=s.device)
            cache = budgeted(model, s, "keydiff", compile=bool(s.compiled_batches))
            seconds = self.clock.once(lambda c=cache, i=ids: prefill(model, c, i, s.chunk))
            self.keep(
                what="prefill",
                cache="keydiff",
                context=context,
                seconds=seconds,
                peak_mib=_peak(s),
                kv_mib=cache.nbytes / _MIB,
            )
            cache.check_integrity()
            caches["keydiff"] = cache

    def _ours(
        self, model: PreTrainedModel, caches: dict[str, Any], batch: int, compiled: bool, store: str
    ) -> None:
        s = self.s
        if store == "model":
            cache = caches["keydiff"].copy()  # it has seen the longest context
            cache.batch_repeat_interleave(batch)
        else:
            cache = budgeted(model, s, "keydiff", compile=compiled, store=store)
            prefill(
                model,
                cache,
                torch.randint(s.vocabulary, (batch, s.budget + s.chunk // 4), device=s.device),
                s.chunk,
            )
        _free(s)
        seen = cache.seen
        run = (
            torch.compile(type(model).forward, fullgraph=True, dynamic=False, mode="reduce-overhead")
            if compiled
            else None
        )
        decoder = Decoder(model, cache, seen, batch, None if run is None else lambda **k: run(model, **k))
        start = time.perf_counter()
        decoder()
        self.clock.sync()
        first = time.perf_counter() - start
        self.keep(
            what="decode",
            cache="keydiff",
            how="compiled" if compiled else "eager",
            store=store,
            batch=batch,
            seen=seen,
            held=s.budget,
            **timed(decoder, s, self.clock),
            first_s=first,
            peak_mib=_peak(s),
            kv_mib=cache.nbytes / _MIB,
        )
        cache.check_integrity()

    def _static(self, model: PreTrainedModel, batch: int) -> None:
        s = self.s
        modicum.detach(model)
        try:
            cache = random_static(model, s, batch, s.budget)
            run = torch.compile(type(model).forward, fullgraph=True, dynamic=False, mode="reduce-overhead")
            decoder = Decoder(model, cache, s.budget, batch, lambda **k: run(model, **k))
            self.keep(
                what="decode",
                cache="StaticCache",
                how="compiled",
                store="model",
                batch=batch,
                seen=s.budget,
                held=s.budget,
                **timed(decoder, s, self.clock),
                peak_mib=_peak(s),
            )
        finally:
            modicum.attach(model)

    def _dynamic(self, model: PreTrainedModel, batch: int) -> None:
        s = self.s
        modicum.detach(model)
        try:
            for length in (s.budget, *s.contexts):
                size = batch
                if s.device == "cuda":
                    free = torch.cuda.mem_get_info()[0]
                    # A step joins keys and values anew, layer by layer: two layers' more than what is held.
                    most = int((free - 3 * 2**30) // (s.token_nbytes * length * (1 + 2 / s.layers)))
                    size = min(batch, most)
                if size < batch and (length != s.contexts[-1] or batch != s.batches[-1]):
                    self.keep(
                        what="decode", cache="DynamicCache", how="eager", batch=batch, seen=length, fits=size
                    )
                    continue
                cache = random_dynamic(s, size, length)
                row = timed(Decoder(model, cache, length, size), s, self.clock, warm=1)
                self.keep(
                    what="decode",
                    cache="DynamicCache",
                    how="eager",
                    batch=size,
                    seen=length,
                    held=length,
                    **row,
                    peak_mib=_peak(s),
                )
                del cache
                _free(s)
        finally:
            modicum.attach(model)

    def _policies(self, model: PreTrainedModel) -> None:
        s = self.s
        ids = torch.randint(s.vocabulary, (1, s.budget + s.chunk // 4), device=s.device)
        for policy in s.policies:
            cache = budgeted(model, s, policy)
            prefill(model, cache, ids, s.chunk)
            decoder = Decoder(model, cache, cache.seen, 1)
            self.keep(
                what="policy",
                cache=policy,
                how="eager",
                batch=1,
                held=s.budget,
                **timed(decoder, s, self.clock),
            )
            cache.check_integrity()

    def _one_shot(self, model: PreTrainedModel) -> None:
        s = self.s
        modicum.detach(model)
        try:
            for context in s.contexts:
                _free(s)
                ids = torch.randint(s.vocabulary, (1, context), device=s.device)
                cache = DynamicCache(config=model.config)
                seconds = self.clock.once(lambda c=cache, i=ids, n=context: prefill(model, c, i, n))
                self.keep(
                    what="prefill", cache="DynamicCache", context=context, seconds=seconds, peak_mib=_peak(s)
                )
                del cache
        finally:
            modicum.attach(model)

    def table(self) -> Table:
        """Everything in one."""
        table = Table(title=f"{self.raw['device']}, copy {self.raw['copy_gbs']:.0f} GB/s")
        for name in ("what", "cache", "how", "batch", "seen", "result", "peak MiB"):
            table.add_column(name)
        for r in self.raw["rows"]:
            if "ms" in r:
                result = f"{r['ms']:.2f} ms/token, {1e3 * r['batch'] / r['ms']:.0f} tokens/s"
            elif "seconds" in r:
                result = f"{r['seconds']:.2f} s"
            elif "gbs" in r:
                result = f"{r['us']:.1f} us, {r['gbs']:.0f} GB/s, {r['of_copy']:.0%} of a copy"
            else:
                result = str(r.get("failed") or r.get("skipped") or f"fits {r.get('fits')}")
            peak = f"{r['peak_mib']:.0f}" if r.get("peak_mib") else ""
            table.add_row(
                r["what"],
                r.get("cache") or r.get("kernel", ""),
                " ".join(filter(None, (r.get("how"), r.get("store")))),
                str(r.get("batch", "")),
                str(r.get("seen") or r.get("context", "")),
                result,
                peak,
            )
        return table


def main(arguments: list[str] | None = None) -> None:
    """Measure, write, print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="in little, on any machine")
    parser.add_argument("--json", type=Path, metavar="PATH", help="raw results, written as they come")
    parser.add_argument("--limit", type=float, default=420, help="seconds after which nothing new is begun")
    parser.add_argument("--layers", type=int, help="so many layers, 8K only: to see that it runs")
    parser.add_argument("--kernels", action="store_true", help="the kernels only")
    asked = parser.parse_args(arguments)
    settings = SMALL if asked.small else Settings()
    if asked.layers:
        settings = replace(
            settings, layers=asked.layers, contexts=(8192,), batches=(1, 8), compiled_batches=(1, 8)
        )
    if settings.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here: give --small")
    bench = Bench(settings, asked.json, asked.limit)
    if asked.small and settings.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
        with dispatch.interpreted():
            bench.run()
    elif asked.kernels:
        bench.raw["copy_gbs"] = copy_rate(settings, bench.clock) / 1e9
        bench.attempt("kernels", bench._kernels)
    else:
        bench.run()
    bench.console.print(bench.table())


if __name__ == "__main__":
    main()
