"""RazorAttention's claims: few heads retrieve, the others may stream, and a virtual token makes up for it.

One command: python benchmarks/experiments/razor.py [--model reference] [--out DIR] [--quick]
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import common
import razor_page
import replay
import torch
from asking import TASKS, Context, Outcome, ask, fitting, ruler
from torch import Tensor

from modicum import BudgetCache
from modicum.compat import cache_kwargs
from modicum.kv import compensation
from modicum.kv.cache import use_head_scores
from modicum.kv.heads import HeadScores, probe
from modicum.kv.policies.razor import RazorAttention

Head = tuple[int, int]
"""Layer and KV head."""
TOKENS = {"no token": None, "N_d^0": 0.0, "N_d^0.5": 0.5, "N_d^1": 1.0}
"""Forms of the virtual token: the power of N_d in its weight; the paper's is 1."""


@dataclass(frozen=True)
class Settings:
    """Sizes; seeds are fixed."""

    lengths: tuple[int, ...] = (1024, 640, 448)
    """Tokens of a task's context with its questions: the longest that the model can do."""
    contexts: int = 16
    chunk: int = 128
    n_sink: int = 4
    recent: int = 32
    probe_tokens: int = 256
    probe_seeds: tuple[int, ...] = (0, 1, 2)
    draws: int = 6
    """Random sets of other heads."""
    shares: tuple[float, ...] = (0, 1 / 12, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 3 / 4)
    random_orders: int = 1
    ablated: tuple[float, ...] = (1 / 12, 1 / 6, 1 / 4, 1 / 3)
    texts: int = 12
    text_length: int = 576
    seed: int = 7

    @property
    def least(self) -> int:
        """Slots of a head that only streams: sinks, recent tokens, the virtual token."""
        return self.n_sink + self.recent + 1


QUICK = Settings(
    lengths=(320,),
    contexts=4,
    draws=1,
    shares=(0, 0.25),
    random_orders=1,
    ablated=(0.25,),
    texts=4,
    text_length=256,
)


class Bench:
    """A model whose heads may be told to hold everything or to stream."""

    def __init__(self, model: Any, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.scores = probe(model, tokens=settings.probe_tokens, seeds=settings.probe_seeds)
        self.heads: list[Head] = [(i, j) for i, n in enumerate(self.scores.heads) for j in range(n)]

    def order(self) -> list[Head]:
        """By the paper's rule: the 1 % with the highest echo, then by induction."""
        by = [
            sorted(self.heads, key=lambda h: -table[h[0]][h[1]])
            for table in (self.scores.echo, self.scores.induction)
        ]
        first = by[0][: -(-len(self.heads) // 100)]
        return first + [h for h in by[1] if h not in first]

    def found(self) -> list[Head]:
        """The paper's retrieval heads: the top 1 % by echo and the top 14 % by induction."""
        kinds = RazorAttention().retrieval(self.scores)
        return [h for h in self.heads if kinds[h[0]][h[1]]]

    def policy(
        self, whole: Collection[Head], tokens: int, slots: int, token: bool = True
    ) -> tuple[str | RazorAttention, int]:
        """A policy and its budget: heads `whole` hold `tokens`, all others `slots`, their virtual token
        included."""
        n, all_ = len(whole), len(self.heads)
        if n == all_:
            return "full", tokens
        if n == 0:  # nothing to mix: no virtual token then
            return "streamingllm", slots
        marks = [[float((i, j) in whole) for j in range(h)] for i, h in enumerate(self.scores.heads)]
        none = [[0.0] * h for h in self.scores.heads]
        use_head_scores(self.model, HeadScores(echo=none, induction=marks))
        budget = -(-(n * tokens + (all_ - n) * slots) // all_)
        policy = RazorAttention(echo=0.0, induction=n / all_, share=budget / slots, compensate=token)
        return policy, budget

    def ask(
        self,
        contexts: Sequence[Context],
        whole: Collection[Head],
        slots: int | None = None,
        token: bool = True,
        chunk: int | None = None,
    ) -> Outcome:
        """What is right where only `whole` hold the context; read at once unless chunk is given."""
        s = self.settings
        most = max(len(c.ids) for c in contexts)
        room = most + max(len(q.ids) + sum(map(len, q.answers)) for c in contexts for q in c.questions)
        policy, budget = self.policy(whole, room, slots or s.least, token)
        return ask(
            self.model, contexts, policy, budget, chunk=chunk or room, n_sink=s.n_sink, recent=s.recent
        )


def knockout(bench: Bench, tasks: dict[str, list[Context]]) -> dict[str, Any]:
    """Heads limited to sinks and recent tokens, without virtual token: those found, others, each alone."""
    draw, s = random.Random(bench.settings.seed), bench.settings
    found = bench.found()
    others = [h for h in bench.heads if h not in found]
    sets = [draw.sample(others, min(len(found), len(others))) for _ in range(s.draws)]

    def without(gone: Collection[Head], contexts: list[Context]) -> dict[str, Any]:
        return asdict(bench.ask(contexts, [h for h in bench.heads if h not in gone], token=False))

    layers = len(bench.scores.heads)
    raw: dict[str, Any] = {"found": found, "sets": sets, "tasks": {}}
    for task, contexts in tasks.items():
        raw["tasks"][task] = {
            "full": without([], contexts),
            "found": without(found, contexts),
            "random": [without(gone, contexts) for gone in sets],
            "others": without(others, contexts),
        }
        if task == "needle":
            few = contexts[:8]
            raw["single"] = [without([h], few) for h in bench.heads]
            raw["layers"] = [without([h for h in bench.heads if h[0] == i], few) for i in range(layers)]
            raw["single_full"] = without([], few)
    return raw


def shares(bench: Bench, tasks: dict[str, list[Context]]) -> list[dict[str, Any]]:
    """Accuracy and measured bytes against the share of heads that hold everything."""
    s, rows = bench.settings, []
    orders: list[tuple[str, list[Head]]] = [("probe", bench.order())]
    for i in range(s.random_orders):
        orders.append((f"random {i}", random.Random(f"{s.seed}/{i}").sample(bench.heads, len(bench.heads))))
    wide = max(s.least, max(len(c.ids) for c in tasks["needle"]) // 5)  # the paper's buffer, N / 5
    forms = [(name, order, s.least, None) for name, order in orders]
    forms += [("probe, N/5", bench.order(), wide, None), ("probe, chunks", bench.order(), s.least, s.chunk)]
    for task, contexts in tasks.items():
        for name, order, slots, chunk in forms:
            for share in s.shares:
                whole = order[: round(share * len(order))]
                done = bench.ask(contexts, whole, slots, chunk=chunk)
                rows.append({"task": task, "form": name, "share": share, "heads": len(whole), **asdict(done)})
        done = bench.ask(contexts, bench.heads)
        rows.append({"task": task, "form": "full", "share": 1.0, "heads": len(bench.heads), **asdict(done)})
    return rows


@contextmanager
def weighing(power: float) -> Iterator[None]:
    """The virtual token's weight is N_d to a power instead of N_d."""
    plain = compensation.virtual_logit

    def logit(q: Tensor, k: Tensor, count: Tensor, scaling: float, softcap: float | None = None) -> Tensor:
        return plain(q, k, torch.where(count > 0, count**power, count), scaling, softcap)

    compensation.virtual_logit = logit
    try:
        yield
    finally:
        compensation.virtual_logit = plain


def ablation(bench: Bench, tasks: dict[str, list[Context]], ids: Tensor) -> list[dict[str, Any]]:
    """The virtual token with and without its weight, and none: accuracy, output error, logits."""
    s, rows, order = bench.settings, [], bench.order()
    first = replay.first_loss(ids.shape[1], s.chunk, s.least)
    logs, wanted = _logs(bench.model, ids, None, first), ids[:, first + 1 :, None]
    tape = replay.record(bench.model, ids)
    for share in s.ablated:
        whole = order[: round(share * len(order))]
        stream = [h for h in bench.heads if h not in whole]
        for label, power in TOKENS.items():
            row: dict[str, Any] = {"share": share, "token": label, "scores": {}}
            with weighing(1.0 if power is None else power):
                for task, contexts in tasks.items():
                    row["scores"][task] = asdict(bench.ask(contexts, whole, token=power is not None))
                policy, budget = bench.policy(whole, ids.shape[1], s.least, power is not None)

                def cache(policy: Any = policy, budget: int = budget) -> BudgetCache:
                    return BudgetCache(
                        bench.model, policy, budget, chunk=s.chunk, n_sink=s.n_sink, recent=s.recent
                    )

                mine = _logs(bench.model, ids, cache(), first)
                outs = replay.feed(bench.model, cache(), tape)
            row["kl"] = (logs.exp() * (logs - mine)).sum(-1).mean(1).tolist()
            row["loss"] = [-x for x in mine.gather(-1, wanted).mean((1, 2)).tolist()]
            row["error"] = _errors(outs, tape, stream, bench.scores.heads, first)
            rows.append(row)
    full = [-x for x in logs.gather(-1, wanted).mean((1, 2)).tolist()]
    return [{"share": 1.0, "token": "full cache", "loss": full}, *rows]


def run(asked: common.Options, settings: Settings) -> dict[str, Any]:
    """Measure everything; the raw results, ready for JSON."""
    model, tokenizer = common.load(asked.model)
    spent: dict[str, float] = {}
    with common.timed("probe", spent):
        length, compared = fitting(model, tokenizer, settings.lengths, settings.seed)
        bench = Bench(model, settings)
        tasks = {
            name: ruler(tokenizer, task, settings.contexts, length, settings.seed)
            for name, task in TASKS.items()
        }
    with common.timed("knock-out", spent):
        out = knockout(bench, tasks)
    with common.timed("shares", spent):
        swept = shares(bench, {"needle": tasks["needle"]})
    with common.timed("virtual token", spent):
        ids = common.running_text(tokenizer, settings.texts, settings.text_length)
        tokens = ablation(bench, {"needle": tasks["needle"]}, ids)
    return {
        "model": common.name_of(model),
        "settings": asdict(settings),
        "seconds": spent,
        "compared": compared,
        "context_tokens": {t: sum(len(c.ids) for c in cs) / len(cs) for t, cs in tasks.items()},
        "scores": {"echo": bench.scores.echo, "induction": bench.scores.induction},
        "knockout": out,
        "shares": swept,
        "token": tokens,
    }


@torch.no_grad()
def _logs(model: Any, ids: Tensor, cache: BudgetCache | None, first: int) -> Tensor:
    """Log probabilities of the next token at positions first to the last but one, [B, n, V]."""
    out = model(input_ids=ids, **cache_kwargs(model, cache), use_cache=cache is not None)
    return torch.log_softmax(out.logits[:, first:-1].float(), -1)


def _errors(
    outs: list[Tensor], tape: replay.Tape, heads: Sequence[Head], kv_heads: Sequence[int], first: int
) -> list[float]:
    """Relative output error of these heads over all later queries, mean over layers, per text."""
    per_layer = []
    for i, (out, r) in enumerate(zip(outs, tape.layers, strict=True)):
        mine = [j for layer, j in heads if layer == i]
        if not mine:
            continue
        group = out.shape[2] // kv_heads[i]
        at = torch.tensor([j * group + g for j in mine for g in range(group)])
        per_layer.append(replay.relative(out[:, first:, at], r.out[:, first:, at]))
    errors: list[float] = torch.stack(per_layer).mean(0).tolist()
    return errors


def main() -> None:
    asked = common.options(__doc__)
    razor_page.publish(asked, run(asked, QUICK if asked.quick else Settings()))


if __name__ == "__main__":
    main()
