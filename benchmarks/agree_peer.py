"""kvpress' side of `agree_kvpress.py`: runs tasks in an environment of its own and tells what was kept.

Run by the driver: `python agree_peer.py FOLDER` reads FOLDER/tasks.json and the weights beside it, and writes
FOLDER/peer.json and FOLDER/peer.safetensors (scores, and the keys of a plain full cache).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import torch
from agree_models import Task, Tiny, padding, read_tasks
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


class EdgeSnapKV(kvpress.SnapKVPress):
    """SnapKV whose pooling averages, at the edges, over the neighbours that there are, as modicum's does."""

    def score(self, *args: Any, **kwargs: Any) -> Tensor:
        scores = super().score(*args, **kwargs)
        n, half = scores.shape[-1] - self.window_size, self.kernel_size // 2
        at = torch.arange(n)
        neighbours = (at + half).clamp_max(n - 1) - (at - half).clamp_min(0) + 1
        scores[..., :n] *= self.kernel_size / neighbours
        return _refill(scores, self.window_size)


class SummedSnapKV(EdgeSnapKV):
    """And whose score is the window's sum, not its mean: so that an ε added to it weighs the same."""

    def score(self, *args: Any, **kwargs: Any) -> Tensor:
        return _refill(super().score(*args, **kwargs) * self.window_size, self.window_size)


class SummedAttention(kvpress.ObservedAttentionPress):
    """Observed attention without the division by the number of queries that saw a token: H2O's sum."""

    def score(self, *args: Any, **kwargs: Any) -> Tensor:
        scores = super().score(*args, **kwargs)
        return scores * torch.arange(scores.shape[-1], 0, -1)


class EdgePyramid(EdgeSnapKV, kvpress.PyramidKVPress):
    """PyramidKV with the edges of `EdgeSnapKV`."""


class WindowedNonCausal(kvpress.NonCausalAttnPress):
    """Compactor's attention whose last `window` tokens stay, and whose mean of three neighbours is, at the
    edges, over those that there are, as modicum's.
    """

    window = 0

    def score(self, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, *args: Any) -> Tensor:
        scores = super().score(module, hidden, keys, values, *args)
        # Their z-scores are undone up to their unit, which ranks alike: at the edges by what pooling missed.
        queries = hidden.view(*hidden.shape[:2], -1, keys.shape[-1]).transpose(1, 2)
        group = queries.shape[1] // keys.shape[1]
        mass = self.non_causal_chunked_attn(queries, keys.repeat_interleave(group, 1), self.chunk_size)
        weighed = mass.unflatten(1, (-1, group)).mean(2) * values.norm(dim=-1)
        pooled = torch.nn.functional.avg_pool1d(weighed, 3, 1, 1)
        unit = pooled.std().clamp_min(1e-6)
        scores[..., 0] += pooled[..., 0] / 2 / unit
        scores[..., -1] += pooled[..., -1] / 2 / unit
        return _refill(scores, self.window)


def _noncausal(ratio: float, window: int) -> WindowedNonCausal:
    press = WindowedNonCausal(ratio, chunk_size=16)
    press.window = window
    return press


def _refill(scores: Tensor, window: int) -> Tensor:
    scores[..., -window:] = scores[..., :-window].max() + 1
    return scores


def make_press(task: Task, columns: int) -> kvpress.BasePress:
    """The press that keeps exactly `budget` of `columns` entries: int(n · (1 − ratio)) is it."""
    ratio = 1 - (task.budget + 1e-6) / columns
    snap = {"compression_ratio": ratio, "window_size": task.window}
    wrappers: dict[str, Callable[[Any], kvpress.BasePress]] = {
        "adakv": kvpress.AdaKVPress,
        "criticalkv": kvpress.CriticalKVPress,
    }
    bases: dict[str, Callable[[], kvpress.BasePress]] = {
        "keydiff": lambda: kvpress.KeyDiffPress(ratio),
        "knorm": lambda: kvpress.KnormPress(ratio),
        "tova": lambda: kvpress.TOVAPress(ratio),
        "streamingllm": lambda: kvpress.StreamingLLMPress(ratio, n_sink=4),
        "observed": lambda: kvpress.ObservedAttentionPress(ratio),
        "observed-summed": lambda: SummedAttention(ratio),
        "snapkv": lambda: kvpress.SnapKVPress(**snap),
        "snapkv-edges": lambda: EdgeSnapKV(**snap),
        "snapkv-summed": lambda: SummedSnapKV(**snap),
        "noncausal-windowed": lambda: _noncausal(ratio, task.window),
        "pyramidkv": lambda: kvpress.PyramidKVPress(**snap, beta=task.beta),
        "pyramidkv-edges": lambda: EdgePyramid(**snap, beta=task.beta),
    }
    *outer, base = task.press.split("+")
    press = bases[base]()
    for name in reversed(outer):
        press = wrappers[name](press)
    return press


class Watch:
    """Sees what a press compresses: the keys before and after, and the scores."""

    def __init__(self, press: kvpress.BasePress) -> None:
        self.press = press
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []
        self.scores: list[Tensor] = []
        scorer = press.press if isinstance(press, kvpress.AdaKVPress) else press
        self._compress, self._score = press.compress, scorer.score
        press.compress = self.compress
        scorer.score = self.score

    def compress(
        self, module: Any, hidden: Tensor, keys: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.before.append(keys.clone())
        out: tuple[Tensor, Tensor] = self._compress(module, hidden, keys, *args, **kwargs)
        self.after.append(out[0])
        return out

    def score(self, *args: Any, **kwargs: Any) -> Tensor:
        scores: Tensor = self._score(*args, **kwargs)
        self.scores.append(scores.clone())  # a wrapper may write into it
        return scores


def kept_positions(
    before: Tensor, after: Tensor, masked: tuple[Tensor, ...] | None, pads: list[int]
) -> list[Any]:
    """[B][H]: positions kept, pads not counted; -1 for each pad that was kept."""
    rows = []
    for row, skip in enumerate(pads):
        heads = []
        for head in range(before.shape[1]):
            if masked is not None:  # entries that stay in memory and are overwritten by a fake key
                mine = (masked[0] == row) & (masked[1] == head)
                gone = set(masked[2][mine].tolist())
                columns = [at for at in range(before.shape[2]) if at not in gone]
            else:
                # Which row of `before` each kept key is, bit for bit; pads may be alike.
                same = (after[row, head, :, None] == before[row, head, None, skip:]).all(-1)
                if int(same.sum(1).max()) > 1:
                    raise RuntimeError("two tokens have one key: their positions cannot be told apart")
                columns = (same.int().argmax(1) + skip).tolist()
                columns = [at if any_ else -1 for at, any_ in zip(columns, same.any(1).tolist(), strict=True)]
            heads.append(sorted(at - skip if at >= skip else -1 for at in columns))
        rows.append(heads)
    return rows


def live_nbytes(cache: DynamicCache, model: PreTrainedModel) -> tuple[int, int]:
    """Bytes of live storage of keys and values, and of the indices of entries that are masked."""
    stored = {t.untyped_storage() for layer in cache.layers for t in (layer.keys, layer.values)}
    masks = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
    indices = {t.untyped_storage() for mask in masks if mask is not None for t in mask}
    return sum(s.nbytes() for s in stored), sum(s.nbytes() for s in indices)


@torch.no_grad()
def forward(model: PreTrainedModel, ids: list[list[int]], pads: list[int], cache: DynamicCache) -> None:
    """One prefill, with the mask and the positions that left padding asks for."""
    tokens = torch.tensor(ids)
    mask = padding(pads, tokens.shape[1])
    where = {}
    if any(pads):
        where = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1, **where)


def run(task: Task, model: PreTrainedModel) -> tuple[dict[str, Any], list[Tensor]]:
    """What was kept and held, and the scores of each layer."""
    model.set_attn_implementation("eager" if "observed" in task.press else "sdpa")
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    press, cache = make_press(task, len(task.ids[0])), DynamicCache()
    watch = Watch(press)
    with press(model):
        forward(model, task.ids, task.pads, cache)
    nbytes, indices = live_nbytes(cache, model)
    result: dict[str, Any] = {"nbytes": nbytes, "indices_nbytes": indices}
    if task.kept:
        masks = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
        result["kept"] = [
            kept_positions(before, after, mask, task.pads)
            for before, after, mask in zip(watch.before, watch.after, masks, strict=True)
        ]
    return result, watch.scores if task.kept else []


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results, tensors, models = {}, {}, dict[Tiny, PreTrainedModel]()
    for task in read_tasks(folder / "tasks.json"):
        if task.model not in models:
            models[task.model] = model = task.model.load(folder)
            if task.kept:
                full = DynamicCache()
                forward(model, task.ids, task.pads, full)
                for i, layer in enumerate(full.layers):
                    tensors[f"full/{task.model.name}/{i}"] = layer.keys.contiguous()
        results[task.key], scores = run(task, models[task.model])
        tensors |= {f"{task.key}/{i}": s.float().contiguous() for i, s in enumerate(scores)}
    save_file(tensors, folder / "peer.safetensors")
    versions = {name: version(name) for name in ("kvpress", "transformers", "torch")}
    told = json.dumps({"versions": versions, "results": results})
    (folder / "peer.json").write_text(told, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
