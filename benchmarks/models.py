"""Which causal LMs get a budget cache: writes docs/models.md from a tiny random model of every type.

    python benchmarks/models.py                  # all types that this transformers knows, a few minutes
    python benchmarks/models.py llama qwen3_next # some of them, to the screen

A type is served if a cache is built and, with a budget as large as the text, the logits of a long call, a
second long call and three single tokens are those of transformers' own cache in the same calls.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import warnings
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track
from tiny_configs import causal_lm_types, tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from modicum import BudgetCache, ModicumError
from modicum.compat import cache_kwargs
from modicum.kv.layer_shape import LayerShape

_DOCS = Path(__file__).resolve().parents[1] / "docs" / "models.md"
_CUTS = (0, 23, 37, 38, 39, 40)
_SERVED, _REFUSED, _UNTRIED, _WRONG = "served", "refused", "not tried", "wrong"
_OPERATIONS = 2048
"""Roundings in a row that two right evaluations of these networks may differ by, as a share of the logits."""


@dataclass(frozen=True)
class Outcome:
    """What came of one type."""

    model_type: str
    kind: str
    note: str
    """Layers of a served type; the reason otherwise."""


def try_type(model_type: str) -> Outcome:
    """Build a tiny model of a type, and compare its two caches."""
    try:
        torch.manual_seed(0)
        built: Any = AutoModelForCausalLM.from_config(tiny_config(model_type))
        model: PreTrainedModel = built.eval()
        ids = torch.randint(3, 90, (1, _CUTS[-1]))
        theirs = _logits(model, ids, DynamicCache(config=model.config))
    except Exception as error:  # whatever transformers raises, it is not ours to say more
        theirs, why = None, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        if "model" not in locals():
            return Outcome(model_type, _UNTRIED, f"no tiny model can be built ({why})")
    try:
        cache = BudgetCache(model, "keydiff", 64, chunk=16, recent=4)
        layers = cache.shape.layers
        if theirs is None:
            return Outcome(model_type, _UNTRIED, f"transformers' own cache fails ({why})")
        ours = _logits(model, ids, cache)
        cache.check_integrity()
    except ModicumError as error:
        return Outcome(model_type, _REFUSED, str(error).split("cannot be served: ")[-1])
    bound = 2 * _OPERATIONS * torch.finfo(torch.float32).eps * float(theirs.abs().max())
    error = float((ours - theirs).abs().max())
    if not error <= bound:
        return Outcome(model_type, _WRONG, f"logits differ by {error:.2g}, rounding explains {bound:.2g}")
    return Outcome(model_type, _SERVED, describe(layers) + ("" if cache.shape.continues else _ANEW))


_ANEW = (
    "; its recurrent layers begin anew in a second call of several tokens, so a prompt is read in one call"
)


def _logits(model: PreTrainedModel, ids: Tensor, cache: Any) -> Tensor:
    call: Any = model
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    parts = []
    for a, b in pairwise(_CUTS):
        more = {"position_ids": torch.arange(a, b)[None]} if takes_positions else {}
        with torch.no_grad():
            out = call(input_ids=ids[:, a:b], use_cache=True, **cache_kwargs(model, cache), **more)
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


def describe(layers: tuple[LayerShape, ...]) -> str:
    """The kinds of layers, in words."""
    kinds = Counter(_kind(layer) for layer in layers)
    text = ", ".join(kinds) if len(kinds) > 1 else next(iter(kinds))
    return text if any(layer.is_full for layer in layers) else f"{text}; nothing to budget"


def _kind(layer: LayerShape) -> str:
    if not layer.kv_heads:
        return "recurrent" if layer.num_states else "without a cache of its own"
    text = "window" if layer.window is not None else "latent" if layer.is_latent else "full"
    text += " with sinks" if layer.has_sinks else ""
    text += " and recurrent" if layer.num_states else ""
    return text + (" (read by other layers too)" if layer.num_readers else "")


def page(outcomes: list[Outcome]) -> str:
    """The page."""
    number = Counter(outcome.kind for outcome in outcomes)
    lines = [
        "# Models",
        "",
        "<!-- Written by benchmarks/models.py; do not edit. -->",
        "",
        f"Of the {len(outcomes)} model types that transformers {transformers.__version__} has a causal LM "
        f"for, **{number[_SERVED]} are served**, {number[_REFUSED]} are refused with a reason, and "
        f"{number[_UNTRIED]} could not be tried with a tiny random model. Served means: with a budget as "
        "large as the text, two long calls and three single tokens give the logits of "
        "transformers' own cache.",
        "",
        "Layers with full attention are under the budget. Windows (chunked attention too) keep their window, "
        "recurrent states are kept whole; the bytes of both count. A latent layer (MLA) keeps one latent "
        "vector per token for all heads.",
        "",
        "| type | layers |",
        "|---|---|",
        *(f"| `{o.model_type}` | {o.note} |" for o in outcomes if o.kind == _SERVED),
        "",
    ]
    for kind, title in ((_WRONG, "Wrong"), (_REFUSED, "Refused"), (_UNTRIED, "Not tried")):
        if number[kind]:
            rows = [f"| `{o.model_type}` | {o.note.replace('|', '/')} |" for o in outcomes if o.kind == kind]
            lines += [f"## {title}", "", "| type | why |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def main() -> None:
    """Try the types and write the page, or print what came of some."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("types", nargs="*", help="model types; all without any")
    parser.add_argument("--docs", type=Path, default=_DOCS, help="the page to write")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(logging.CRITICAL)
    torch.set_num_threads(1)
    outcomes = [try_type(name) for name in track(given.types or causal_lm_types(), "Model types")]
    if given.types:
        for outcome in outcomes:
            print(f"{outcome.model_type}: {outcome.kind}: {outcome.note}")
        return
    given.docs.write_text(page(outcomes), encoding="utf-8")
    print(Counter(outcome.kind for outcome in outcomes))


if __name__ == "__main__":
    main()
