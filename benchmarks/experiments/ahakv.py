"""AhaKV's claims on the reference model: where H2O looks, the entropy of its rows, and what its parts do.

    python benchmarks/experiments/ahakv.py

Writes docs/experiments/ahakv.json and pictures, and renews the tables of docs/experiments/ahakv.md.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from ability import LENGTHS, TASKS, Ability, sentence
from ablation import PARTS, Ablation, every
from ahakv_pictures import draw_ablations, draw_entropy, draw_places
from asking import ask
from common import SCORES, load, name_of, options, paint, percent, publish, running_text, scored, table, timed
from interval import Interval
from listening import listen
from torch import Tensor
from torch.nn import functional as F

from modicum import AhaKV, BudgetCache, View
from modicum.compat import cache_kwargs
from modicum.kv.call import cuts
from modicum.kv.policy import Policy

POLICIES = ("h2o", "ahakv", "snapkv", "keydiff")
CHUNK = 128
SINKS, RECENT = 4, 32
BINS = 20


@dataclass(frozen=True)
class Settings:
    """One run."""

    texts: int = 4
    length: int = 2048
    """Of the texts whose kept positions are looked at."""
    kept: int = 256
    """Budget there."""
    lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    """At which the rows' entropy is measured."""
    targets: tuple[int, ...] = (64, 128, 256)
    """Budgets whose logarithm it should have."""
    lengths_asked: tuple[int, ...] = LENGTHS
    contexts: int = 16
    """With questions, per task."""
    scored: int = 512
    """Length of the texts whose perplexity is taken; four times as many as `texts`."""
    parts: tuple[int, ...] = (8, 4)
    """Budgets: these parts of the length."""
    seed: int = 23


QUICK = Settings(
    texts=2, length=1024, kept=128, lengths=(256, 512, 1024), targets=(64, 128), contexts=6, parts=(4,)
)


# ------------------------------------------------------------------ kept positions


def places(model: Any, ids: Tensor, s: Settings) -> list[dict[str, Any]]:
    """Where the kept tokens stood, as a share of the text; protected ones left out."""
    found = []
    for chunk in (ids.shape[1], CHUNK):
        for policy in POLICIES:
            cache = _read(model, ids, policy, s.kept, chunk)
            at = torch.stack([cache.positions(i) for i in range(len(cache.layers))], 1)  # [B, L, H, N]
            per_text = []
            for row in at:
                free = row[(row >= SINKS) & (row < ids.shape[1] - RECENT)].double()
                per_text.append((free - SINKS) / (ids.shape[1] - RECENT - SINKS))
            shares = torch.cat(per_text)
            heights = torch.histc(shares, BINS, 0, 1) / len(shares) * BINS
            layers = [float(_free(at[:, i], ids.shape[1]).mean()) for i in range(at.shape[1])]
            found.append(
                {
                    "policy": policy,
                    "chunk": chunk,
                    **asdict(Interval.of([float(p.mean()) for p in per_text])),
                    "layers": layers,
                    "first half": float((shares < 0.5).double().mean()),
                    "histogram": heights.tolist(),
                }
            )
    return found


def _free(at: Tensor, n: int) -> Tensor:
    """Positions that nothing protected, as shares of the room there is."""
    return (at[(at >= SINKS) & (at < n - RECENT)].double() - SINKS) / (n - RECENT - SINKS)


@torch.no_grad()
def _read(model: Any, ids: Tensor, policy: str | Policy, budget: int, chunk: int) -> BudgetCache:
    cache = BudgetCache(model, policy, budget, chunk=chunk, n_sink=SINKS, recent=RECENT)
    for a, b in cuts(ids.shape[1], chunk):
        model(input_ids=ids[:, a:b], **cache_kwargs(model, cache), use_cache=True, logits_to_keep=1)
    return cache


# ------------------------------------------------------------------ entropy


@dataclass(frozen=True)
class Watched(AhaKV):
    """AhaKV that notes the entropy of the rows it chooses by."""

    noted: list[float] = field(default_factory=list, compare=False)

    def score(self, view: View) -> Tensor:
        self.noted.append(float(_entropy(view.rows(self.gain(view))).mean()))
        return super().score(view)


def entropies(model: Any, tokenizer: Any, s: Settings) -> list[dict[str, Any]]:
    """Mean entropy of the last 32 rows with and without the gain, in nats: over all tokens (the full cache),
    and as the policy meets them when it reads in chunks and only the survivors are there.

    The gain presumes logits of a normal distribution with variance 1. So the logits' own spread is noted, and
    the entropy with the gain once each row's logits are brought to mean 0 and variance 1.
    """
    found = []
    positions = model.config.max_position_embeddings
    for n in [length for length in s.lengths if length <= positions]:
        ids = running_text(tokenizer, 2, n)
        heard: dict[str, list[Tensor]] = defaultdict(list)

        def hear(view: View, heard: dict[str, list[Tensor]] = heard) -> None:
            count = view.asked[1] + 1
            logits = view.logits()
            there = logits.isfinite()
            middle = logits.masked_fill(~there, 0).sum(-1, keepdim=True) / there.sum(-1, keepdim=True)
            spread = (logits - middle).masked_fill(~there, 0).square().sum(-1, keepdim=True)
            spread = (spread / there.sum(-1, keepdim=True)).sqrt()
            heard["spread"].append(spread.mean((0, 2, 3, 4)))
            heard["plain"].append(_entropy(view.rows()).mean((0, 2, 3)))
            for k in s.targets:
                gain = (2 * (count / k).clamp_min(1).log()).sqrt()
                heard[str(k)].append(_entropy(view.rows(gain)).mean((0, 2, 3)))
                even = torch.softmax((logits - middle) / spread * gain[:, None, None, :, None], -1)
                heard[f"{k} standardised"].append(_entropy(even).mean((0, 2, 3)))

        listen(model, ids, hear, rows=32)
        for k in (None, *s.targets):
            layers = heard["plain" if k is None else str(k)]
            heads = torch.stack(layers).flatten().double()
            noted: list[float] = []
            if k is not None and n > k + CHUNK:
                watched = Watched()
                _read(model, ids, watched, k, CHUNK)
                noted = watched.noted[-len(layers) :]  # of the last chunk
            found.append(
                {
                    "tokens": n,
                    "budget": k,
                    "entropy": float(heads.mean()),
                    "quartiles": heads.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist(),
                    "layers": [float(layer.mean()) for layer in layers],
                    "chunked": sum(noted) / len(noted) if noted else None,
                    "standardised": None if k is None else _mean(heard[f"{k} standardised"]),
                    "spread": _mean(heard["spread"]),
                }
            )
    return found


def _mean(layers: list[Tensor]) -> float:
    return float(torch.stack(layers).mean())


def _entropy(rows: Tensor) -> Tensor:
    """Of attention rows [..., N] in nats."""
    return torch.special.entr(rows).sum(-1)


# ------------------------------------------------------------------ ablation


def ablations(model: Any, tokenizer: Any, abilities: list[Ability], s: Settings) -> list[dict[str, Any]]:
    """Right answers and perplexity under the budget with AhaKV's parts on and off."""
    _check(model, tokenizer)
    tasks = [(a, TASKS[a.task](tokenizer, s.contexts, a.length, s.seed)) for a in abilities]
    text = running_text(tokenizer, 4 * s.texts, s.scored)
    settings: list[tuple[str, str | Policy, int]] = [("full cache", "full", 0)]
    for part in s.parts:
        settings += [*((p.label, p, part) for p in every()), ("SnapKV", "snapkv", part)]
    found = []
    for label, policy, part in settings:
        row: dict[str, Any] = {"policy": label, "part": part}
        for able, contexts in tasks:
            budget = able.budget(part) if part else 2 * able.length
            done = ask(model, contexts, policy, budget, chunk=CHUNK, n_sink=SINKS, recent=RECENT)
            nbytes = done.nbytes if part else done.full_nbytes
            row[able.task] = {
                "budget": budget,
                "nbytes": nbytes,
                **scored(done),
            }
        budget = s.scored // part if part else s.scored
        row["loss"] = _losses(model, text, policy, budget, s.scored // min(s.parts))
        found.append(row)
        print(label, part, [percent(row[t]) for t in TASKS], row["loss"], file=sys.stderr, flush=True)
    return found


def _check(model: Any, tokenizer: Any) -> None:
    """The ends of the ablation are the library's own policies: they keep the same tokens."""
    ids = running_text(tokenizer, 2, 400)
    for made, own in ((Ablation(), "ahakv"), (every()[-1], "h2o")):
        ours, theirs = (_read(model, ids, policy, 96, 64) for policy in (made, own))
        for layer in range(len(ours.layers)):
            if not torch.equal(ours.positions(layer).sort(-1)[0], theirs.positions(layer).sort(-1)[0]):
                raise SystemExit(f"the ablation {made.label} does not keep what {own} keeps")


@torch.no_grad()
def _losses(model: Any, ids: Tensor, policy: str | Policy, budget: int, first: int) -> list[float]:
    """Mean loss per text, in nats, of the tokens after the first `first`, read chunk by chunk."""
    guard = {"n_sink": 0, "recent": 0} if policy == "full" else {"n_sink": SINKS, "recent": RECENT}
    cache = BudgetCache(model, policy, budget, chunk=CHUNK, **guard)
    losses = []
    for a, b in cuts(ids.shape[1] - 1, CHUNK):
        logits = model(input_ids=ids[:, a:b], **cache_kwargs(model, cache), use_cache=True).logits.float()
        losses.append(F.cross_entropy(logits.transpose(1, 2), ids[:, a + 1 : b + 1], reduction="none"))
    told: list[float] = torch.cat(losses, 1)[:, first:].mean(1).tolist()
    return told


# ------------------------------------------------------------------ what is shown


def section(results: dict[str, Any]) -> str:
    """The tables, in Markdown."""
    s = results["settings"]
    parts = [
        "### Where the kept tokens stood",
        "",
        f"{s['texts']} pieces of {s['length']:,} tokens of running text, {s['kept']} kept per KV head. 0 is "
        f"the start, 1 the end; the {SINKS} sinks and {RECENT} recent tokens, which all keep, are left out. "
        "An even choice has mean 0.50.",
        "",
        table(
            ["read", "policy", "mean place", "in the first half", "least and most of the layers' means"],
            [
                [
                    "at once" if row["chunk"] == s["length"] else f"in chunks of {row['chunk']}",
                    row["policy"],
                    f"{row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}]",
                    f"{100 * row['first half']:.0f} %",
                    f"{min(row['layers']):.2f} to {max(row['layers']):.2f}",
                ]
                for row in results["places"]
            ],
        ),
        "",
        "### Entropy of the rows that score",
        "",
        "Mean over layers, heads and the last 32 queries of running text, in nats (quartiles of the "
        "KV heads). The gain is to hold it at ln b. *Spread* is the standard deviation of a row's logits z, "
        "which the gain's derivation takes to be 1; *standardised*: the gain on logits brought to mean 0 and "
        f"spread 1; *survivors*: the rows by which AhaKV chooses at the last of the chunks of {CHUNK}.",
        "",
        _entropy_table(results["entropy"], s),
        "",
        "### Parts switched off",
        "",
        results["lengths_asked"],
        "",
        "recent: the last 32 queries instead of all; step: the step gain; prior: values' norms. Budgets are "
        f"parts of the length. {s['contexts']} contexts per task, chunks of {CHUNK}, question hidden. "
        + SCORES,
        "",
        f"Perplexity of {4 * s['texts']} × {s['scored']:,} tokens of running text, from token "
        f"{s['scored'] // min(s['parts'])} on, and beside it the difference in loss to AhaKV on the same "
        "texts (nats).",
        "",
        _ablation_table(results["ablations"]),
    ]
    return "\n".join(parts)


def _entropy_table(found: list[dict[str, Any]], s: dict[str, Any]) -> str:
    rows = []
    for n in dict.fromkeys(row["tokens"] for row in found):
        by = {row["budget"]: row for row in found if row["tokens"] == n}
        plain = [f"{n:,}", f"{math.log(n):.2f}", f"{by[None]['spread']:.2f}", _spread(by[None])]
        for k in [k for k in s["targets"] if k < n]:
            row = by[k]
            survivors = "" if row["chunked"] is None else f"{row['chunked']:.2f}"
            cells = [k, f"{math.log(k):.2f}", _spread(row), f"{row['standardised']:.2f}", survivors]
            rows.append([*plain, *cells])
            plain = [""] * len(plain)
    head = ["tokens n", "ln n", "spread", "no gain", "b", "ln b", "with gain", "standardised", "survivors"]
    return table(head, rows)


def _spread(row: dict[str, Any]) -> str:
    low, high = row["quartiles"]
    return f"{row['entropy']:.2f} ({low:.2f} to {high:.2f})"


def _ablation_table(found: list[dict[str, Any]]) -> str:
    rows = []
    whole = {row["part"]: row for row in found if row["policy"] == "AhaKV"}
    for row in found:
        loss = sum(row["loss"]) / len(row["loss"])
        gap = ""
        if row["part"] and row["policy"] != "AhaKV":
            d = Interval.between(row["loss"], whole[row["part"]]["loss"])
            gap = f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
        cells = [percent(row[task]) for task in TASKS]
        part = f"1/{row['part']}" if row["part"] else "all"
        rows.append([row["policy"], part, *cells, f"{math.exp(loss):.2f}", gap])
    return table(["parts", "budget", *TASKS, "perplexity", "loss minus AhaKV's"], rows)


def main() -> None:
    asked = options(__doc__)
    s = QUICK if asked.quick else Settings()
    model, tokenizer = load(asked.model)
    spent: dict[str, float] = {}
    results: dict[str, Any] = {"model": name_of(model), "settings": vars(s), "parts": PARTS, "seconds": spent}
    with timed("places", spent):
        results["places"] = places(model, running_text(tokenizer, s.texts, s.length), s)
    with timed("entropy", spent):
        results["entropy"] = entropies(model, tokenizer, s)
    with timed("ablations", spent):
        abilities = [Ability.of(model, tokenizer, task, s.lengths_asked) for task in TASKS]
        results["lengths_asked"] = sentence(abilities)
        results["ablations"] = ablations(model, tokenizer, abilities, s)
    pictures = {"places": draw_places, "entropy": draw_entropy, "ablations": draw_ablations}
    for name, draw in pictures.items():
        path = None if asked.out is None else asked.out / f"ahakv-{name}.png"
        paint(path, lambda name=name, draw=draw: draw(results[name]))
    publish("ahakv", asked, results, section(results))


if __name__ == "__main__":
    main()
