"""CAOTE's and FastCAOTE's claims: better than their bases in accuracy and in measured output error.

One command: python benchmarks/experiments/caote.py [--model reference] [--out DIR] [--quick]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import caote_page
import common
import replay
import torch
from asking import TASKS, Context, ask, fitting, ruler
from torch import Tensor

from modicum import BudgetCache
from modicum.compat import cache_kwargs
from modicum.kv.policies.caote import CAOTE, FastCAOTE
from modicum.kv.policy import Policy, Wrapper
from modicum.kv.registry import parse_policy
from modicum.kv.view import View

BASES = {"h2o": "h2o", "tova": "tova(heads=each)", "snapkv": "snapkv"}
"""A wrapper's base decides per KV head, so TOVA is compared in that form; "tova" itself is shown beside."""
FORMS = ("", "caote+", "fastcaote+")


@dataclass(frozen=True)
class Settings:
    """Sizes; seeds are fixed."""

    lengths: tuple[int, ...] = (1024, 640, 448)
    """Tokens of a task's context with its questions: the longest that the model can do."""
    contexts: int = 16
    """Of each task."""
    budgets: tuple[float, ...] = (0.25, 0.5)
    """Tokens held, as a share of the length."""
    chunk: int = 128
    texts: int = 8
    text_length: int = 448
    text_budget: int = 112
    steps: int = 16
    """Decode steps in which one token per head goes at a time."""
    seed: int = 3


QUICK = Settings(
    lengths=(320,), contexts=4, budgets=(0.25,), texts=4, text_length=320, text_budget=96, steps=8
)


@dataclass(frozen=True)
class Watch(Wrapper):
    """Evicts as its base, and notes at each eviction how CAOTE, FastCAOTE and the base rank the tokens."""

    name: ClassVar[str] = "watch"

    notes: dict[str, dict[int, list[Tensor]]] = field(default_factory=dict, compare=False)
    """Pair of rankings -> layer -> Spearman's correlations, [B, H, G] at each eviction."""

    def score(self, view: View) -> Tensor:
        plain = self.base.head_scores(view)
        exact, fast = (kind(self.base).head_scores(view) for kind in (CAOTE, FastCAOTE))
        if view.valid is None:
            for pair, (a, b) in {"fast": (exact, fast), "base": (exact, plain)}.items():
                correlation = _spearman(a, b.expand_as(a), ~view.protected)
                self.notes.setdefault(pair, {}).setdefault(view.layer, []).append(correlation)
        return self.base.score(view)


@dataclass(frozen=True)
class Duel(Wrapper):
    """Evicts as its base, one token at a time, and notes what each form's choice would have changed in the
    output of the query at hand, whose attention row is exact; and the least that any choice would have."""

    name: ClassVar[str] = "duel"

    notes: dict[str, dict[int, list[Tensor]]] = field(default_factory=dict, compare=False)
    """Form, "best" or "output" -> layer -> squared norms, [B] at each eviction."""

    def score(self, view: View) -> Tensor:
        _, at = view.asked
        newest = int(at[0].argmax())
        row = view.rows(first=newest, last=newest + 1)[:, :, :, 0]  # [B, H, G, N]
        out, values = view.sum_values(row), view.values.unsqueeze(2).float()
        apart = torch.linalg.vector_norm(out.unsqueeze(3) - values, dim=-1)
        change = (
            (row / (1 - row).clamp_min(1e-6) * apart).square().sum(2)
        )  # [B, H, N]: of the group's outputs together
        plain = self.base.score(view)
        ranked = {
            "": plain,
            "caote+": CAOTE(self.base).score(view),
            "fastcaote+": FastCAOTE(self.base).score(view),
        }
        ranked["best"] = change
        for form, score in ranked.items():
            victim = score.masked_fill(view.protected, math.inf).argmin(-1, keepdim=True)
            self._note(form, view.layer, change.gather(-1, victim).sum((1, 2)))
        self._note("output", view.layer, out.square().sum((1, 2, 3)))
        return plain

    def _note(self, what: str, layer: int, value: Tensor) -> None:
        self.notes.setdefault(what, {}).setdefault(layer, []).append(value)

    def errors(self, form: str) -> list[list[float]]:
        """Layer -> relative change of each text, root of the mean square over the evictions."""
        own, whole = self.notes[form], self.notes["output"]
        return [(sum(own[i]) / sum(whole[i])).sqrt().tolist() for i in sorted(own)]  # type: ignore[union-attr]


def policies() -> list[str]:
    """Every policy of the comparison."""
    return [form + base for base in BASES.values() for form in FORMS]


def accuracy(
    model: Any, tasks: dict[str, list[Context]], budgets: Sequence[int], chunk: int
) -> dict[str, Any]:
    """What was right per task, policy and budget; question hidden, prefill in chunks."""
    found: dict[str, Any] = {}
    for task, contexts in tasks.items():
        most = max(len(context.ids) for context in contexts) + 256
        found[task] = {"tokens": sum(len(c.ids) for c in contexts) / len(contexts), "policies": {}}
        found[task]["full"] = asdict(ask(model, contexts, "full", most, chunk=most))
        for policy in [*policies(), "tova"]:
            found[task]["policies"][policy] = {
                str(budget): asdict(ask(model, contexts, policy, budget, chunk=chunk)) for budget in budgets
            }
    return found


def block_errors(model: Any, tape: replay.Tape, settings: Settings) -> dict[str, list[list[float]]]:
    """Policy -> layer -> relative output error of each text, for all queries after the first eviction."""
    found = {}
    budget, chunk = settings.text_budget, settings.chunk
    first = replay.first_loss(tape.layers[0].query.shape[2], chunk, budget)
    for policy in policies():
        cache = BudgetCache(model, policy, budget, chunk=chunk)
        outs = replay.feed(model, cache, tape)
        found[policy] = [
            replay.relative(out[:, first:], r.out[:, first:]).tolist()
            for out, r in zip(outs, tape.layers, strict=True)
        ]
    return found


def step_errors(model: Any, tape: replay.Tape, settings: Settings) -> dict[str, dict[str, list[list[float]]]]:
    """The same where one token per head goes at a time: "own", what an eviction changes in the output of the
    query at hand, all forms choosing from the same tokens; "later", against the full cache."""
    found: dict[str, dict[str, list[list[float]]]] = {"own": {}, "later": {}}
    for policy in policies():
        found["later"][policy] = [
            replay.relative(out[:, 1:], r.out[:, 1:]).tolist()  # the first step loses nothing beforehand
            for out, r in _stepped(model, tape, parse_policy(policy), settings)
        ]
    for policy in BASES.values():
        duel = Duel(parse_policy(policy))
        _stepped(model, tape, duel, settings)
        for form in (*FORMS, "best"):
            found["own"][form + policy] = duel.errors(form)
    return found


def _stepped(
    model: Any, tape: replay.Tape, policy: Policy, settings: Settings
) -> list[tuple[Tensor, replay.Recorded]]:
    """Each layer's outputs over decode steps after a prompt that fills the budget, and what was recorded."""
    budget, end = settings.text_budget, settings.text_budget + settings.steps
    cache = BudgetCache(model, policy, budget, chunk=settings.chunk)
    replay.feed(model, cache, tape.part(0, budget))
    steps = [replay.feed(model, cache, tape.part(at, at + 1)) for at in range(budget, end)]
    outs = [torch.cat(layer, 1) for layer in zip(*steps, strict=True)]
    return list(zip(outs, tape.part(budget, end).layers, strict=True))


@torch.no_grad()
def divergence(model: Any, ids: Tensor, settings: Settings) -> dict[str, Any]:
    """KL(full || policy) of the next token and the loss, in nats, per text; after the first eviction."""
    first = replay.first_loss(ids.shape[1], settings.chunk, settings.text_budget)
    full = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[:, first:-1].float(), -1)
    wanted = ids[:, first + 1 :, None]
    found: dict[str, Any] = {"full": {"loss": _loss(full, wanted)}}
    for policy in policies():
        cache = BudgetCache(model, policy, settings.text_budget, chunk=settings.chunk)
        out = model(input_ids=ids, **cache_kwargs(model, cache), use_cache=True)
        mine = torch.log_softmax(out.logits[:, first:-1].float(), -1)
        kl = (full.exp() * (full - mine)).sum(-1).mean(1)
        found[policy] = {"kl": kl.tolist(), "loss": _loss(mine, wanted)}
    return found


def correlations(model: Any, tape: replay.Tape, settings: Settings) -> dict[str, Any]:
    """Base -> pair -> [layers][query heads]: mean Spearman correlation over evictions and texts."""
    found = {}
    for base, policy in BASES.items():
        watch = Watch(parse_policy(policy))
        cache = BudgetCache(model, watch, settings.text_budget, chunk=settings.chunk)
        replay.feed(model, cache, tape)
        found[base] = {
            pair: [torch.stack(layers[i]).mean((0, 1)).flatten().tolist() for i in sorted(layers)]
            for pair, layers in watch.notes.items()
        }
    return found


def run(asked: common.Options, settings: Settings) -> dict[str, Any]:
    """Measure everything; the raw results, ready for JSON."""
    model, tokenizer = common.load(asked.model)
    spent: dict[str, float] = {}
    with common.timed("accuracy", spent):
        length, compared = fitting(model, tokenizer, settings.lengths, settings.seed)
        tasks = {
            name: ruler(tokenizer, task, settings.contexts, length, settings.seed)
            for name, task in TASKS.items()
        }
        budgets = [8 * round(length * share / 8) for share in settings.budgets]
        scores = accuracy(model, tasks, budgets, settings.chunk)
    ids = common.running_text(tokenizer, settings.texts, settings.text_length)
    more = settings.text_length + 200
    longer = ruler(tokenizer, "niah_multikey_1:max_new_tokens=16", settings.texts, more, settings.seed + 1)
    buried = torch.tensor([context.ids[: settings.text_length] for context in longer])
    sources = {"text": ids, "needles": buried}
    blocks, steps = {}, {}
    with common.timed("output errors", spent):
        for source, tokens in sources.items():
            tape = replay.record(model, tokens)
            blocks[source] = block_errors(model, tape, settings)
            steps[source] = step_errors(model, tape, settings)
    with common.timed("rank correlations", spent):
        ranks = correlations(model, replay.record(model, ids), settings)
    with common.timed("logits", spent):
        logits = divergence(model, ids, settings)
    return {
        "model": common.name_of(model),
        "settings": asdict(settings),
        "seconds": spent,
        "budgets": budgets,
        "compared": compared,
        "accuracy": scores,
        "blocks": blocks,
        "steps": steps,
        "ranks": ranks,
        "logits": logits,
    }


def _loss(logs: Tensor, wanted: Tensor) -> list[float]:
    return [-x for x in logs.gather(-1, wanted).mean((1, 2)).tolist()]


def _spearman(a: Tensor, b: Tensor, among: Tensor) -> Tensor:
    """[B, H, G, N] twice, over the tokens `among` [B, H, N], of which every head has as many: [B, H, G]."""
    shape = (*a.shape[:3], -1)
    among = among.unsqueeze(2).expand_as(a)
    return common.spearman(a[among].view(shape), b[among].view(shape)).float()


def main() -> None:
    asked = common.options(__doc__)
    results = run(asked, QUICK if asked.quick else Settings())
    caote_page.publish(asked, results, BASES, FORMS)


if __name__ == "__main__":
    main()
