"""Records what kvpress keeps of a small random layer, for tests/kv/test_kvpress_agreement.py.

Runs in kvpress' environment (`agree_kvpress.py` says how to make it):

    .venv-kvpress/bin/python benchmarks/agree_fixture.py tests/data/kvpress_kept.json

The file holds the inputs too, so that no test depends on how some torch draws random numbers. A stand-in for
the attention module hands the recorded queries to the presses: its query projection is the identity, RoPE's
angle is 0.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from agree_models import Task, Tiny
from agree_peer import Watch, kept_positions, make_press
from torch import Tensor

_HEADS, _GROUP, _TOKENS, _DIM, _HIDDEN = 2, 2, 48, 8, 12
_WINDOW, _LAYERS = 4, 3
_BUDGETS = (8, 17, 24, 40)
_PRESSES = (
    "keydiff",
    "knorm",
    "tova",
    "streamingllm",
    "snapkv",
    "snapkv-edges",
    "adakv+snapkv",
    "adakv+snapkv-edges",
    "criticalkv+snapkv",
    "criticalkv+snapkv-summed",
    "observed",
    "observed-summed",
    "noncausal-windowed",
)
_PYRAMIDS = ((16, 2), (24, 4), (28, 4))
"""Budget and β with which kvpress does not fall back to equal layers."""
_CLEAR = 1e-4  # no score that is kept may be so near, relatively, to one that is not


def draw(seed: int) -> dict[str, Tensor]:
    """Queries [H·G, n, D], keys and values [H, n, D], output projection [hidden, H·G·D]; 4 decimals."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {
        "queries": (_HEADS * _GROUP, _TOKENS, _DIM),
        "keys": (_HEADS, _TOKENS, _DIM),
        "values": (_HEADS, _TOKENS, _DIM),
        "output": (_HIDDEN, _HEADS * _GROUP * _DIM),
    }
    drawn = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    drawn["queries"] *= 1.5
    drawn["keys"] += 0.5  # a mean for KeyDiff
    return {
        name: torch.tensor([round(x, 4) for x in t.flatten().tolist()]).view(t.shape)
        for name, t in drawn.items()
    }


def stand_in(inputs: dict[str, Tensor], layer: int) -> Any:
    """What a press looks at of an attention module."""
    heads = _HEADS * _GROUP
    project = torch.nn.Linear(heads * _DIM, _HIDDEN, bias=False)
    project.weight.data.copy_(inputs["output"])
    return SimpleNamespace(
        config=SimpleNamespace(
            num_attention_heads=heads,
            num_key_value_heads=_HEADS,
            head_dim=_DIM,
            hidden_size=_HIDDEN,
            num_hidden_layers=_LAYERS,
            _attn_implementation="sdpa",
        ),
        head_dim=_DIM,
        num_key_value_groups=_GROUP,
        layer_idx=layer,
        q_proj=torch.nn.Identity(),
        o_proj=project,
        masked_key_indices=None,
    )


def attention(inputs: dict[str, Tensor]) -> Tensor:
    """Causal attention rows [1, H·G, n, n], as eager attention would hand them over."""
    keys = inputs["keys"].repeat_interleave(_GROUP, dim=0)
    logits = inputs["queries"] @ keys.transpose(1, 2) * _DIM**-0.5
    later = torch.ones(_TOKENS, _TOKENS, dtype=torch.bool).triu(1)
    return logits.masked_fill(later, -torch.inf).softmax(-1)[None]


@torch.no_grad()
def compress(
    inputs: dict[str, Tensor], press: str, budget: int, layer: int = 0, beta: int = 20
) -> list[list[int]]:
    """[H]: positions that the press keeps, in order.

    Raises:
        RuntimeError: the choice hangs on a near tie, so that another torch might choose otherwise.
    """
    module = stand_in(inputs, layer)
    task = Task("", press, Tiny("none"), [], [0], budget, _WINDOW, beta)
    watch = Watch(make_press(task, _TOKENS))
    watch.press.compress(
        module,
        inputs["queries"].transpose(0, 1).reshape(1, _TOKENS, -1),
        inputs["keys"][None],
        inputs["values"][None],
        attention(inputs) if "observed" in press else None,
        {"position_embeddings": (torch.ones(1, _TOKENS, _DIM), torch.zeros(1, _TOKENS, _DIM))},
    )
    kept = kept_positions(watch.before[0], watch.after[0], module.masked_key_indices, [0])[0]
    score, taken = watch.scores[0][0], torch.zeros(_HEADS, _TOKENS, dtype=torch.bool)
    for head, at in enumerate(kept):
        taken[head, at] = True
    groups = [(score, taken)] if press.startswith("adakv") else list(zip(score, taken, strict=True))
    for values, inside in groups:
        low, high = float(values[inside].min()), float(values[~inside].max())
        if press != "streamingllm" and not low - high > _CLEAR * max(abs(low), abs(high)):
            raise RuntimeError(f"{press}, budget {budget}: {low} is kept, {high} is not: take another seed")
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    inputs = draw(args.seed)
    kept = {press: {str(b): compress(inputs, press, b) for b in _BUDGETS} for press in _PRESSES}
    pyramid = [
        {
            "budget": budget,
            "beta": beta,
            "layers": [
                len(compress(inputs, "pyramidkv", budget, layer, beta)[0]) for layer in range(_LAYERS)
            ],
        }
        for budget, beta in _PYRAMIDS
    ]
    decimals = {
        name: [[[round(x, 4) for x in row] for row in head] for head in t.view(-1, *t.shape[-2:]).tolist()]
        for name, t in inputs.items()
    }
    recorded = {
        "about": "Positions kept by kvpress of one random layer; made by benchmarks/agree_fixture.py.",
        "versions": {name: version(name) for name in ("kvpress", "transformers", "torch")},
        "seed": args.seed,
        "window": _WINDOW,
        **decimals,
        "kept": kept,
        "pyramid": pyramid,
    }
    args.path.write_text(json.dumps(recorded, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
