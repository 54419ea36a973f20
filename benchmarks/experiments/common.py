"""What the experiments share: their command line, model and texts, tables, pictures, and where results go."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from asking import Outcome
from interval import Interval
from torch import Tensor

import modicum

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # machine.py, picture.py

DOCS = Path(__file__).resolve().parents[2] / "docs" / "experiments"
COLOURS = {
    "keydiff": "#0072b2",
    "ahakv": "#d55e00",
    "h2o": "#009e73",
    "snapkv": "#cc79a7",
    "tova": "#e69f00",
    "streamingllm": "#56b4e9",
}
"""One per policy in all pictures (Okabe and Ito's)."""
MARKERS = {"keydiff": "o", "ahakv": "s", "h2o": "^", "snapkv": "D", "tova": "v", "streamingllm": "P"}

SCORES = (
    "Right answers in %, and the share of the answers' tokens that were right, each given those before it, "
    "which tells more where few answers are right as a whole; both with 95 % bootstrap intervals over "
    "contexts."
)


@dataclass(frozen=True)
class Options:
    """How an experiment was called."""

    model: str
    out: Path | None
    """Folder for JSON and pictures, and for the page whose tables are renewed; None writes nothing."""
    quick: bool


def options(description: str | None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="reference", help="an embedded name, a folder, or a Hub name")
    parser.add_argument("--out", type=Path, help="folder for results (docs/experiments; none with --quick)")
    parser.add_argument("--quick", action="store_true", help="few samples: checks that all of it runs")
    asked = parser.parse_args()
    return Options(asked.model, asked.out or (None if asked.quick else DOCS), asked.quick)


def load(name: str) -> tuple[Any, Any]:
    """The model in float32 on the CPU, and its tokenizer; one thread, so that times mean one core."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return modicum.load(name, dtype="float32", device="cpu")


def name_of(model: Any) -> str:
    """The model in words."""
    c = model.config
    size = sum(p.numel() for p in model.parameters()) / 1e6
    return (
        f"{size:.1f} M parameters, {c.num_hidden_layers} layers, hidden {c.hidden_size}, "
        f"{c.num_attention_heads} query and {c.num_key_value_heads} KV heads of {c.head_dim}"
    )


def running_text(tokenizer: Any, rows: int, length: int) -> Tensor:
    """Pieces of the sample text, which the reference model has not read: [rows, length].

    Each begins with the tokenizer's own first token, and they are spread evenly over the text.
    """
    lines = modicum.sample_text().split("\n\n")
    text = "\n".join(" ".join(paragraph.split()) for paragraph in lines if paragraph.strip())
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start: list[int] = tokenizer("a", verbose=False)["input_ids"]
    first = start[: len(start) - len(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])]
    room = length - len(first)
    step = (len(ids) - room) // max(1, rows - 1) if rows > 1 else 0
    return torch.tensor([[*first, *ids[i * step : i * step + room]] for i in range(rows)])


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation along the last dimension: [..., n] and [..., n] -> [...]."""
    ranks = [x.argsort(-1).argsort(-1).double() for x in (a, b)]
    x, y = (r - r.mean(-1, keepdim=True) for r in ranks)
    return (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()


@contextmanager
def timed(what: str, spent: dict[str, float]) -> Iterator[None]:
    """Say on stderr what is being done, and note its seconds of processor time, child processes included."""
    print(f"{what} ...", file=sys.stderr, flush=True)
    start = os.times()
    yield
    spent[what] = round(sum(os.times()[:4]) - sum(start[:4]), 1)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others are aligned to the right."""
    lines = [
        "| " + " | ".join(head) + " |",
        "| " + " | ".join(["---", *["---:"] * (len(head) - 1)]) + " |",
        *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows),
    ]
    return "\n".join(lines)


def mib(nbytes: float) -> str:
    """Bytes as MiB, three digits."""
    return f"{nbytes / 2**20:.3g}"


def scored(done: Outcome) -> dict[str, Any]:
    """Means over contexts with their intervals, and each context's own."""
    return {
        key: {**asdict(Interval.of(each)), "each": each}
        for key, each in (("right", done.right), ("tokens", done.tokens))
    }


def percent(row: dict[str, Any]) -> str:
    """Right answers and right tokens of answers with their intervals, in percent."""
    right, tokens = (
        f"{100 * x['mean']:.0f} [{100 * x['low']:.0f}, {100 * x['high']:.0f}]"
        for x in (row["right"], row["tokens"])
    )
    return f"{right}, tokens {tokens}"


def publish(name: str, asked: Options, results: dict[str, Any], section: str) -> None:
    """Print the section; write the JSON, and renew the section of the page where there is one."""
    from machine import describe

    told = describe()
    told = {k: v for k, v in told.items() if k in ("processor", "cores", "torch", "transformers", "modicum")}
    minutes = sum(results["seconds"].values()) / 60
    how = f"with --quick, {minutes:.1f} minutes" if asked.quick else f"{minutes:.1f} minutes"
    section = (
        f"Measured {date.today().isoformat()}, {how} of one core ({told['processor']}), torch "
        f"{told['torch']}, transformers {told['transformers']}; model: {asked.model}, "
        f"{results['model']}.\n\n{section}"
    )
    print(section)
    if asked.out is None:
        return
    asked.out.mkdir(parents=True, exist_ok=True)
    data = {"experiment": name, "machine": told, "command": vars(asked) | {"out": None}, **results}
    (asked.out / f"{name}.json").write_text(json.dumps(_rounded(data), indent=1) + "\n", encoding="utf-8")
    page = asked.out / f"{name}.md"
    if page.is_file():
        from page import write_section

        write_section(page, "results", section)


def paint(path: Path | None, draw: Callable[[], Any]) -> None:
    """Draw a figure and write it as a PNG of few colours; nothing without a path."""
    if path is None:
        return
    from picture import paint as write

    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, draw)


def _rounded(value: Any) -> Any:
    """Floats to five digits: a results file that one can read."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return value
