"""Which policy at which budget? Three uses, shares of the full cache's bytes, all policies and mixtures.

One command: python benchmarks/experiments/which.py [--model reference] [--out DIR] [--quick]
All cores work, each with one thread; started again after an interruption, it goes on.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import common
import torch
import which_page
from asking import Context, Outcome, Question, ask, led, ruler

from modicum import BudgetCache
from modicum.compat import cache_kwargs
from modicum.tasks.haystack import haystack
from modicum.tasks.needle import NEEDLE, TEMPLATE

SINGLE = (
    "streamingllm",
    "random",
    "knorm",
    "keydiff",
    "manifoldkv",
    "h2o",
    "tova",
    "ahakv",
    "snapkv",
    "razor",
)
DEFENSIVE = "snapkv(group=max,over=max,floor=True)"
MIXED = (
    DEFENSIVE,
    "caote+snapkv",
    "caote+tova",
    "criticalkv+snapkv",
    "pyramidkv+snapkv",
    "adakv+snapkv",
    "adakv+keydiff",
    f"caote+{DEFENSIVE}",
    f"adakv+{DEFENSIVE}",
    f"adakv+caote+{DEFENSIVE}",
    "auto",
    "razor(base=snapkv,strong=0.2)",
    f"razor(base=caote({DEFENSIVE}),strong=0.2)",
)
PARTS = (
    "razor(base=manifoldkv)",
    "razor(strong=0.2)",
    "razor(base=manifoldkv,strong=0.2,compensate=False)",
    "razor(base=manifoldkv,induction=0.3)",
)
"""What `auto` named before calibrated budgets, `razor(base=manifoldkv,strong=0.2)`, less a part each."""
SLOW = "adakv"
"""Heads that compete take minutes where tokens leave a few at a time: no long answers with them."""
_FACT = re.compile(
    re.escape(NEEDLE.format(type_needle_v="numbers", key="@", value="%"))
    .replace("@", r"([^.:]+?)")
    .replace("%", r"(\d+)")
)


@dataclass(frozen=True)
class Settings:
    """Sizes; seeds are fixed."""

    lengths: tuple[int, ...] = (1024, 512)
    """Of the contexts: the longest at which the full cache finds what is asked."""
    contexts: int = 8
    facts: int = 8
    shares: tuple[float, ...] = (0.1, 0.25, 0.5)
    """Budgets, as shares of the full cache's bytes."""
    chunk: int = 256
    stream: int = 896
    """Tokens of the long answers."""
    step: int = 4
    """Tokens of a long answer that are read at a time."""
    policies: tuple[str, ...] = (*SINGLE, *MIXED)
    parts: tuple[str, ...] = PARTS
    seed: int = 17


QUICK = Settings(
    lengths=(512,),
    contexts=4,
    shares=(0.5,),
    stream=256,
    policies=("keydiff", "snapkv", "auto"),
    parts=PARTS[:1],
)


def facts_of(text: str) -> list[tuple[str, str]]:
    """Keys and values of the needles in a text."""
    return _FACT.findall(text)


def many_questions(tokenizer: Any, length: int, settings: Settings) -> list[Context]:
    """A text with needles, and one question for each."""
    made = ruler(tokenizer, _task(settings), settings.contexts, length, settings.seed)
    contexts = []
    for context in made:
        facts = facts_of(tokenizer.decode(context.ids))
        questions = [_question(tokenizer, key, value) for key, value in facts[: settings.facts]]
        contexts.append(Context(context.ids, questions))
    return contexts


def long_prompts(contexts: Sequence[Context], rng: random.Random) -> list[Context]:
    """One of the questions at the end of the prompt: all but its last token is read under the budget."""
    prompts = []
    for context in contexts:
        for question in rng.sample(context.questions, 2):
            *first, last = question.ids
            prompts.append(Context([*context.ids, *first], [Question([last], question.answers)]))
    return prompts


@dataclass(frozen=True)
class Stream:
    """A long answer: token ids, and where the values stand that are looked up in it."""

    ids: list[int]
    values: list[tuple[int, int]]
    """First and one past the last token of each."""


def long_answers(tokenizer: Any, settings: Settings) -> list[Stream]:
    """Text that states a fact now and then, and after each from the third on asks for one of those before."""
    sentences = haystack(None).first(100_000)
    words = many_questions(tokenizer, settings.lengths[-1], settings)
    streams = []
    for row, context in enumerate(words):
        rng = random.Random(f"{settings.seed}/{row}")
        facts = facts_of(tokenizer.decode(context.ids))
        ids, values = context.ids[:1], []
        room = settings.stream // len(facts)
        at = rng.randrange(len(sentences) // 2)
        for i, (key, value) in enumerate(facts):
            part = _ids(tokenizer, " " + NEEDLE.format(type_needle_v="numbers", key=key, value=value))
            asked: list[int] = []
            if i >= 2:
                old, wanted = rng.choice(facts[: i - 1])
                question = _question(tokenizer, old, wanted)
                asked, (answer,) = question.ids, question.answers
            hay: list[int] = []
            left = room - len(part) - len(asked) - (len(answer) + 1 if asked else 0)
            while len(hay) < left:
                hay += _ids(tokenizer, " " + sentences[at])
                at += 1
            ids += hay[: max(0, left)] + part + asked
            if asked:
                values.append((len(ids), len(ids) + len(answer)))
                ids += answer + _ids(tokenizer, ".")
        streams.append(Stream(ids, values))
    length = min(len(s.ids) for s in streams)
    return [Stream(s.ids[:length], [v for v in s.values if v[1] <= length]) for s in streams]


@torch.no_grad()
def follow(
    model: Any, streams: Sequence[Stream], policy: str, budget: int | str, step: int, store: str = "model"
) -> Outcome:
    """Read the streams side by side, a few tokens at a time; which values would have been written?"""
    ids = torch.tensor([stream.ids for stream in streams])
    chunk = ids.shape[1] if policy == "full" else step
    cache = BudgetCache(model, policy, budget, chunk=chunk, store=store)
    guesses = []
    for start in range(0, ids.shape[1], chunk):
        out = model(input_ids=ids[:, start : start + chunk], **cache_kwargs(model, cache), use_cache=True)
        guesses.append(out.logits.argmax(-1))
    guessed = torch.cat(guesses, 1)[:, :-1]
    right, tokens = [], []
    for row, stream in enumerate(streams):
        hits = [(guessed[row, a - 1 : b - 1] == ids[row, a:b]).tolist() for a, b in stream.values]
        right.append(fmean(all(hit) for hit in hits))
        tokens.append(fmean(fmean(hit) for hit in hits))
    rows = len(streams)
    return Outcome(right, tokens, cache.nbytes // rows, cache.full_nbytes // rows)


class Bench:
    """One process's model, and the three uses at one length of context.

    Args:
        model: its name.
        settings: the experiment's.
        length: tokens of a context.
        full: bytes of the full cache per use; where it is missing, only the full cache can be measured.
    """

    def __init__(
        self, model: str, settings: Settings, length: int, full: dict[str, int] | None = None
    ) -> None:
        self.model, tokenizer = common.load(model)
        self.settings = settings
        self.full = full or {}
        self._most = length + 512
        self._contexts = many_questions(tokenizer, length, settings)
        self._prompts = long_prompts(self._contexts, random.Random(settings.seed))
        self.streams = long_answers(tokenizer, settings)

    def measure(self, use: str, policy: str, share: float | None, store: str = "model") -> Outcome:
        """One use under one policy, with this share of the full cache's bytes, or with all that it takes."""
        budget = self.settings.stream + 512 if use == "long answer" else self._most
        allowed: int | str = budget if share is None else f"{int(share * self.full[use])}B"
        if use == "long answer":
            return follow(self.model, self.streams, policy, allowed, self.settings.step, store)
        asked = self._prompts if use == "long prompt" else self._contexts
        chunk = self._most if share is None else self.settings.chunk
        return ask(self.model, asked, policy, allowed, chunk=chunk, store=store)


Cell = tuple[str, str, float]
"""A use, a policy, and a share of the full cache's bytes."""
_benches: list[Bench] = []  # one in each worker


def _settle(model: str, settings: Settings, length: int, full: dict[str, int]) -> None:
    _benches.append(Bench(model, settings, length, full))


def _measured(cell: Cell) -> tuple[Cell, dict[str, Any], float]:
    start = time.process_time()
    done = _benches[0].measure(*cell)
    return cell, common.scored(done) | {"nbytes": done.nbytes}, time.process_time() - start


def measure_all(
    cells: Sequence[Cell], begun: Path | None, told: dict[str, Any], *bench: Any
) -> tuple[dict[Cell, Any], float]:
    """All cells on all cores, and the seconds of processor time they took; what an interrupted run of the
    same settings left in `begun` is taken from there."""
    found: dict[Cell, Any] = {}
    seconds = 0.0
    # What follows the last line break is a line cut short by a kill: it is dropped, its cell measured again.
    old = begun.read_text(encoding="utf-8") if begun is not None and begun.is_file() else ""
    whole = old[: old.rfind("\n") + 1]
    lines = whole.splitlines()
    head = json.dumps(told)
    if begun is not None and lines[:1] == [head]:
        os.truncate(begun, len(whole.encode()))
        for cell, row, spent in map(json.loads, lines[1:]):
            found[tuple(cell)] = row
            seconds += spent
    elif begun is not None:
        begun.write_text(head + "\n", encoding="utf-8")
    left = [cell for cell in cells if cell not in found]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, _settle, bench) as pool:
        for at in as_completed([pool.submit(_measured, cell) for cell in left]):
            cell, row, spent = at.result()
            found[cell] = row
            seconds += spent
            print(f"{len(found)} of {len(cells)}: {cell}, {spent:.0f} s", file=sys.stderr, flush=True)
            if begun is not None:
                with begun.open("a", encoding="utf-8") as rows:
                    rows.write(json.dumps([cell, row, spent]) + "\n")
    return found, seconds


def run(asked: common.Options, settings: Settings) -> dict[str, Any]:
    """Measure everything; the raw results, ready for JSON."""
    spent: dict[str, float] = {}
    uses: dict[str, Any] = {}
    with common.timed("the full cache", spent):
        tried = {}
        for length in settings.lengths:
            bench = Bench(asked.model, settings, length)
            wholes = {use: bench.measure(use, "full", None) for use in which_page.USES}
            tried[length] = fmean(wholes["many questions"].right)
            if tried[length] >= 0.75:
                break
        for use, whole in wholes.items():
            uses[use] = {"full": common.scored(whole) | {"nbytes": whole.full_nbytes}, "policies": {}}
    full = {use: part["full"]["nbytes"] for use, part in uses.items()}
    cells: list[Cell] = [
        (u, p, s)
        for u in uses
        for p in settings.policies
        for s in settings.shares
        if not (u == "long answer" and p.startswith(SLOW))
    ]
    cells += [(u, p, s) for u in list(uses)[:2] for p in settings.parts for s in settings.shares[:2]]
    name = common.name_of(bench.model)
    begun = None if asked.out is None else asked.out / "which.rows.jsonl"
    if begun is not None:
        begun.parent.mkdir(parents=True, exist_ok=True)
    told = {"model": name, "full": full, "right": tried, "settings": asdict(settings)}
    found, spent["policies"] = measure_all(cells, begun, told, asked.model, settings, length, full)
    parts: dict[str, Any] = {use: {} for use in list(uses)[:2]}
    for use, policy, share in cells:
        where = uses[use]["policies"] if policy in settings.policies else parts[use]
        where.setdefault(policy, {})[str(share)] = found[use, policy, share]
    return {
        "model": name,
        "settings": asdict(settings),
        "seconds": spent,
        "tried": tried,
        "length": length,
        "stream": len(bench.streams[0].ids),
        "uses": uses,
        "parts": parts,
    }


def _task(settings: Settings) -> str:
    return f"niah_multikey_1:keys={settings.facts},max_new_tokens=16"


def _question(tokenizer: Any, key: str, value: str) -> Question:
    text = TEMPLATE[1].replace("are all", "is").removesuffix("are") + "is"
    text = text.format(type_needle_v="number", query=key)
    return Question(_ids(tokenizer, led(text)), [_ids(tokenizer, f" {value}")])


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def main() -> None:
    asked = common.options(__doc__)
    which_page.publish(asked, run(asked, QUICK if asked.quick else Settings()))
    if asked.out is not None:
        (asked.out / "which.rows.jsonl").unlink()


if __name__ == "__main__":
    main()
