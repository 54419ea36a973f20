"""kvpress on the same tokens, in an environment of its own. Run by compare.py.

    .venv-kvpress/bin/python benchmarks/peers/kvpress_eval.py JOB.json > results.jsonl

It does what kvpress' own pipeline does, with token ids instead of text: the context goes through the model's
body in one call under the press; then come the question and the answer, greedily, at explicit positions, and
nothing more is evicted. Policies are the names of presses, "SnapKVPress", "AdaKVPress(SnapKVPress)" or
"KVzipPress(kvzip_plus_normalization=True)", else with their own defaults; "full" is no press. The
ratio is the one with which int(n · (1 − ratio)) is the wanted number of tokens.
"""

from __future__ import annotations

import re
import time
from functools import cache
from importlib.metadata import version
from typing import Any

import kvpress
import torch
import transformers
from job import Ask, Job, Result, Setting, UnsupportedError, main
from measure import Watch, answer, take

FULL = "full"
_PRESS = re.compile(r"(\w+)(?:\((\w+)(=True)?\))?")
FAILED: dict[Setting, str] = {}
"""Presses after which a question of several tokens cannot be read in one call, and the error."""
VERSIONS = {name: version(name) for name in ("kvpress", "transformers", "torch")}


@cache
def load(folder: str, dtype: str) -> Any:
    """The model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.eval()


def make_press(name: str, ratio: float) -> Any:
    """The press of that name: a scorer, or a wrapper around one."""
    match = _PRESS.fullmatch(name)
    outer, inner, is_option = match.groups() if match else ("", None, None)
    for part in (outer, None if is_option else inner):
        if part is not None and not hasattr(kvpress, part):
            raise UnsupportedError(f"kvpress {VERSIONS['kvpress']} has no {part}")
    if is_option:
        return getattr(kvpress, outer)(compression_ratio=ratio, **{inner: True})
    press = getattr(kvpress, inner or outer)(compression_ratio=ratio)
    return getattr(kvpress, outer)(press=press) if inner else press


def prefill(model: Any, ask: Ask, kept: Any, press: Any, watch: Watch) -> None:
    """The context, under the press; what it makes before the old keys and values are let go counts too."""
    if press is None:
        take(model, kept, ask.context, 0, body=True)
        return
    compress = press.compress

    def watched(*args: Any, **kwargs: Any) -> Any:
        out = compress(*args, **kwargs)
        watch.peak = max(watch.peak, watch.now(out))
        return out

    press.compress = watched
    with press(model):
        take(model, kept, ask.context, 0, body=True)


def attended(model: Any, kept: Any) -> tuple[int, int]:
    """Fewest and most tokens that any KV head can still see; masked ones are stored and not seen."""
    counts: list[int] = []
    for layer, block in zip(kept.layers, model.model.layers, strict=True):
        heads, length = layer.keys.shape[1:3]
        masked = getattr(block.self_attn, "masked_key_indices", None)
        gone = torch.bincount(masked[1], minlength=heads).tolist() if masked is not None else [0] * heads
        counts += [length - g for g in gone]
    return min(counts), max(counts)


def check(model: Any, kept: Any, setting: Setting, wanted: int) -> None:
    """The tokens kept, on average over layers and heads, must be those wanted."""
    total = heads = 0
    for layer, block in zip(kept.layers, model.model.layers, strict=True):
        masked = getattr(block.self_attn, "masked_key_indices", None)
        total += layer.keys.shape[1] * layer.keys.shape[2] - (0 if masked is None else len(masked[1]))
        heads += layer.keys.shape[1]
    # PyramidKV's budgets also count its window on top, unless it falls back to SnapKV. KVzip cuts all heads'
    # scores together, at a share of them that need not be whole tokens a head.
    slack = heads if "KVzip" in setting.policy else 1
    if abs(total - wanted * heads) >= slack and "Pyramid" not in setting.policy:
        raise SystemExit(f"{setting.policy} keeps {total / heads} tokens a head, wanted were {wanted}")


def ask_question(model: Any, kept: Any, ask: Ask, setting: Setting) -> tuple[torch.Tensor, float]:
    """The question in one call, as the pipeline has it; where that call fails, token by token.

    Returns the logits, and the seconds that a failed call took.

    An exception leaves keys behind in the layers before the one that failed: they are cut off again. A press
    whose call failed is not asked for one again, as finding that out can take longer than all the rest.
    """
    n, clock = len(ask.context), time.perf_counter()
    before = [(layer.keys, layer.values) for layer in kept.layers]
    if setting not in FAILED:
        try:
            return take(model, kept, ask.question, n), 0.0
        except (RuntimeError, ValueError) as error:
            FAILED[setting] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        for layer, (keys, values) in zip(kept.layers, before, strict=True):
            layer.keys, layer.values = keys, values
    wasted = time.perf_counter() - clock
    for i, token in enumerate(ask.question):
        logits = take(model, kept, [token], n + i)
    return logits, wasted


def run(job: Job, ask: Ask, setting: Setting) -> Result:
    """One sample under one press."""
    model, n = load(job.model, job.dtype), len(ask.context)
    for block in model.model.layers:
        block.self_attn.masked_key_indices = None
    press, wanted = None, n
    if setting.policy != FULL:
        assert setting.share is not None
        wanted = int(setting.share * n)
        press = make_press(setting.policy, 1 - (wanted + 1e-6) / n)
    torch.manual_seed(0)  # CompactorPress draws a sketch
    kept = transformers.DynamicCache()
    watch = Watch(kept, model)
    extra: dict[str, Any] = {"versions": VERSIONS}
    try:
        with watch.watching():
            clock = time.perf_counter()
            prefill(model, ask, kept, press, watch)
            context_bytes, held = watch.now(), attended(model, kept)
            check(model, kept, setting, wanted)
            if press is not None:
                extra["nominal_share"] = wanted / n
                extra["stored_tokens"] = kept.layers[0].keys.shape[2]
            logits, wasted = ask_question(model, kept, ask, setting)
            seconds = time.perf_counter() - clock - wasted
            if setting in FAILED:
                extra["in_one_call"] = FAILED[setting]
            return answer(
                job, ask, model, kept, watch, logits, seconds,
                context_bytes=context_bytes, held_tokens=held, extra=extra,
            )  # fmt: skip
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UnsupportedError(f"{type(error).__name__}: {error}") from error


if __name__ == "__main__":
    main(run)
