"""transformers' own ways to hold less: a sliding window, and quantised caches. Run by compare.py.

    python benchmarks/peers/transformers_eval.py JOB.json > results.jsonl

Policies: "full" (DynamicCache), "sliding window", and "QuantizedCache(quanto, 4 bits)" and the like. A Llama
has no sliding window in transformers; the same weights loaded as a Mistral, whose code is Llama's and that,
have one in every layer.
"""

from __future__ import annotations

import re
import time
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
import transformers
from job import Ask, Job, Result, Setting, UnsupportedError, main
from measure import Watch, answer, take

FULL, SLIDING = "full", "sliding window"
_QUANTISED = re.compile(r"QuantizedCache\((\w+)(?:, (\d) bits)?\)")


@cache
def load(folder: str, dtype: str, sliding: bool = False) -> Any:
    """The model; with windows as a Mistral, whose width is set for each sample."""
    kwargs: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    model_class: Any = transformers.AutoModelForCausalLM
    if sliding:
        config = transformers.AutoConfig.from_pretrained(folder)
        if config.model_type != "llama":
            raise UnsupportedError(f"a {config.model_type} has no sliding window by configuration alone")
        if config.attention_bias or config.mlp_bias:
            raise UnsupportedError("a Mistral has no biases, this Llama has")
        settings = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
        model_class = transformers.MistralForCausalLM
        kwargs["config"] = transformers.MistralConfig(**{**settings, "sliding_window": None})
    return model_class.from_pretrained(folder, **kwargs).eval()


def make_cache(model: Any, ask: Ask, setting: Setting) -> Any:
    """An empty cache. A sliding window of W leaves W - 1 tokens between calls: those are the share."""
    if setting.policy == SLIDING:
        assert setting.share is not None
        model.config.sliding_window = int(setting.share * len(ask.context)) + 1
        return transformers.DynamicCache(config=model.config)
    if setting.policy == FULL:
        return transformers.DynamicCache(config=model.config)
    match = _QUANTISED.fullmatch(setting.policy)
    if match is None:
        raise UnsupportedError(f"transformers has no cache {setting.policy!r}")
    nbits = {"nbits": int(match[2])} if match[2] else {}
    try:
        return transformers.QuantizedCache(backend=match[1], config=model.config, **nbits)
    except (ImportError, ValueError, TypeError) as error:
        raise UnsupportedError(_short(error)) from error


def run(job: Job, ask: Ask, setting: Setting) -> Result:
    """One sample: the context (in chunks, if so wanted), the question, the answer."""
    model = load(job.model, job.dtype, sliding=setting.policy == SLIDING)
    kept = make_cache(model, ask, setting)
    watch = Watch(kept, model)
    n = len(ask.context)
    try:
        with watch.watching():
            clock = time.perf_counter()
            step = setting.chunk or n
            for start in range(0, n, step):
                take(model, kept, ask.context[start : start + step], start)
            context_bytes, held = watch.now(), _held(kept)
            logits = take(model, kept, ask.question, n)
            seconds = time.perf_counter() - clock
            return answer(
                job, ask, model, kept, watch, logits, seconds,
                context_bytes=context_bytes, held_tokens=held, extra=EXTRA,
            )  # fmt: skip
    except (RuntimeError, ImportError, NotImplementedError, ValueError) as error:
        raise UnsupportedError(_short(error)) from error


def _held(kept: Any) -> tuple[int, int]:
    counts = [
        layer.get_seq_length() if hasattr(layer, "_quantized_keys") else layer.keys.shape[-2]
        for layer in kept.layers
    ]
    return min(counts), max(counts)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


EXTRA = {"versions": {name: version(name) for name in ("transformers", "torch")}}


if __name__ == "__main__":
    main(run)
