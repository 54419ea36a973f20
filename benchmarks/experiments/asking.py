"""Asking: many questions about contexts that a policy has already compressed, in batches, and who was right.

The question is hidden: the context is read in chunks and held to the budget before any question is known. An
answer counts where the model, told the question, ranks each of the answer's tokens first, given those before;
that is what greedy decoding would have written, at one call for all questions. (Between the answer's tokens
nothing is evicted; in decoding one token per head would be, of hundreds.) The reference model's answers begin
with the key that was asked for, "tasty-chalk: 7193558", so questions end with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modicum import BudgetCache
from modicum.compat import cache_kwargs
from modicum.evaluation.runner import as_turn
from modicum.generation.chat import Chat, has_template
from modicum.generation.inputs import Block
from modicum.generation.interrupt import Interrupt
from modicum.generation.reader import Reader
from modicum.kv.policy import Policy
from modicum.tasks import parse_task

_ASKED = re.compile(r"magic \w+ for ([^,?]+) mentioned in the provided text is$")
ROWS = 8  # contexts read side by side
TASKS = {
    "needle": "niah_single_2:max_new_tokens=24",
    "keys": "niah_multikey_1:keys=8,max_new_tokens=24",
}
"""RULER's needles in a text, numbers of seven digits: a single one, and one of eight with their keys."""


@dataclass(frozen=True)
class Question:
    """Token ids of a question and of the answers in the order in which they are to be given."""

    ids: list[int]
    answers: list[list[int]]


@dataclass(frozen=True)
class Context:
    """Token ids of a context, and what is asked of it."""

    ids: list[int]
    questions: list[Question]


@dataclass(frozen=True)
class Outcome:
    """How one setting did."""

    right: list[float]
    """Per context, the share of its answers that were right."""
    tokens: list[float]
    """Per context, the share of its answers' tokens that were right, each given those before it."""
    nbytes: int
    """Of live storage per context, once it was read."""
    full_nbytes: int
    """What a full cache of the context holds."""


def ruler(tokenizer: Any, task: str, count: int, length: int, seed: int, *, first: int = 0) -> list[Context]:
    """Contexts of a task of RULER's kinds from `first` on, each with all the questions that the task asks
    about it; answers in the order of the sample's. Where the tokenizer has a chat template, context and
    question are the user's turn, as in `modicum eval`; else questions end as the reference model's do.
    """
    (made,) = parse_task(task)
    chat = Chat(tokenizer) if has_template(tokenizer) else None
    per = getattr(made, "questions", 1)
    contexts = []
    for context in range(first, first + count):
        samples = [made.sample(context * per + i, length, tokenizer, seed) for i in range(per)]
        texts = [
            (sample.context, led(sample.question)) if chat is None else as_turn(chat, sample)
            for sample in samples
        ]
        questions = [
            Question(_ids(tokenizer, asked), [_ids(tokenizer, f" {answer}") for answer in sample.answers])
            for sample, (_, asked) in zip(samples, texts, strict=True)
        ]
        contexts.append(Context(_ids(tokenizer, texts[0][0], special=chat is None), questions))
    return contexts


def led(question: str) -> str:
    """A question about one key, up to where the value is due."""
    asked = _ASKED.search(question)
    return question if asked is None else f"{question} {asked[1]}:"


def fitting(model: Any, tokenizer: Any, lengths: Sequence[int], seed: int) -> tuple[int, str]:
    """A length, and what to compare by there.

    Eviction cannot be judged where a model fails without it. So: the longest length at which the full cache
    finds four in five needles ("right"); where there is none, the shortest, and answers' tokens ("tokens").
    """
    for length in sorted(lengths, reverse=True):
        contexts = ruler(tokenizer, TASKS["needle"], ROWS, length, seed)
        if sum(ask(model, contexts, "full", length + 256, chunk=length + 256).right) >= 0.8 * ROWS:
            return length, "right"
    return min(lengths), "tokens"


def ask(
    model: Any,
    contexts: Sequence[Context],
    policy: str | Policy,
    budget: int | str,
    *,
    chunk: int = 128,
    n_sink: int = 4,
    recent: int = 32,
    store: str = "model",
    read: Callable[[Reader, Block], None] | None = None,
    prepare: Callable[[BudgetCache], None] | None = None,
) -> Outcome:
    """Read each context under the policy, then ask all its questions, each from the compressed context.

    read: reads the contexts' tokens in its own way; by default in chunks.
    prepare: called with each cache once the contexts are read.
    """
    right: list[float] = []
    tokens: list[float] = []
    nbytes = full = 0
    for first in range(0, len(contexts), ROWS):
        part = contexts[first : first + ROWS]
        length = max(len(c.ids) for c in part)  # of which a budget may be a share
        cache = BudgetCache(
            model, policy, budget, chunk=chunk, n_sink=n_sink, recent=recent, store=store, length=length
        )
        reader = Reader(model, cache, len(part), 0)
        block = Block.of([c.ids for c in part], 0)
        if read is None:
            reader.take(block, Interrupt(), lambda _: None)
        else:
            read(reader, block)
        if prepare is not None:
            prepare(cache)
        nbytes, full = cache.nbytes // len(part), cache.full_nbytes // len(part)
        answers, hits = _answered(model, cache, reader.transcript.valid, part)
        right += answers
        tokens += hits
    return Outcome(right, tokens, nbytes, full)


@torch.no_grad()
def _answered(
    model: Any, cache: BudgetCache, told: torch.Tensor, contexts: Sequence[Context]
) -> tuple[list[float], list[float]]:
    """Per context: the share of answers, and of their tokens, that were right."""
    per = len(contexts[0].questions)
    if any(len(c.questions) != per for c in contexts):
        raise ValueError("contexts of one batch must have as many questions each")
    cache.batch_repeat_interleave(per)
    told = told.repeat_interleave(per, 0)
    rows = [q for c in contexts for q in c.questions]
    asked = Block.of([q.ids for q in rows], 0)
    given = Block.of([_joined(q) for q in rows], 0)
    logits = []
    for block in (asked, given):
        valid = torch.ones_like(block.ids, dtype=torch.bool) if block.valid is None else block.valid
        positions = (told.sum(1, keepdim=True) + valid.cumsum(1) - 1).clamp_min(0)
        told = torch.cat([told, valid], 1)
        keep = 1 if block is asked else 0
        out = model(
            input_ids=block.ids,
            attention_mask=told.long(),
            position_ids=positions,
            **cache_kwargs(model, cache),
            use_cache=True,
            logits_to_keep=keep,
        )
        logits.append(out.logits)
    width = given.ids.shape[1]
    guesses = torch.cat([logits[0], logits[1][:, :-1]], 1).argmax(-1)  # of each of the answer's tokens
    right, hits = [], []
    for row, question in enumerate(rows):
        answer = _joined(question)
        at = width - len(answer)
        # The first guess follows the question; where the row is padded, padding stands in between.
        mine = [int(guesses[row, 0]), *guesses[row, at + 1 :].tolist()]
        done, whole = 0, 0
        for piece in question.answers:
            whole += mine[done : done + len(piece)] == piece
            done += len(piece)
        right.append(whole / len(question.answers))
        hits.append(sum(a == b for a, b in zip(mine, answer, strict=True)) / len(answer))
    starts = range(0, len(rows), per)
    return tuple([sum(x[i : i + per]) / per for i in starts] for x in (right, hits))  # type: ignore[return-value]


def _joined(question: Question) -> list[int]:
    return [token for answer in question.answers for token in answer]


def _ids(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids
