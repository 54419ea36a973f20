"""Runner: one sample under one setting: reads, answers, measures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from modicum.errors import InputError
from modicum.evaluation.allowance import Allowance
from modicum.evaluation.grid import HIDDEN
from modicum.evaluation.row import Cell, Row
from modicum.generation.chat import Chat, has_template
from modicum.generation.inputs import Block, encode
from modicum.generation.interrupt import Interrupt
from modicum.generation.likelihood import log_likelihoods
from modicum.generation.reader import Reader
from modicum.generation.result import held_range
from modicum.generation.text import decode
from modicum.kv.cache import BudgetCache
from modicum.kv.offload import execution_device
from modicum.kv.registry import parse_policy
from modicum.tasks.sample import Sample

Metric = Callable[[str, Any], float]
"""From what was answered and the answers wanted to 0 to 1."""


@dataclass(frozen=True)
class Prompt:
    """A sample's tokens: the same ones for every policy and both question modes."""

    context: list[int]
    """With the tokenizer's special tokens."""
    question: list[int]
    target: list[int]

    @classmethod
    def of(
        cls, sample: Sample, model: Any, tokenizer: Any, *, endless: bool = False, raw: bool = False
    ) -> Prompt:
        """Encode the three texts apart from each other.

        Where the tokenizer has a chat template, context and question are the user's turn, and the answer's
        turn begins with what the sample puts in its mouth. A loss is always of text as it is.

        Args:
            endless: the model's positions are no limit.
            raw: leave the chat template out.

        Raises:
            InputError: there is nothing to read, or it is too long for the model.
        """
        if not sample.context + sample.question:
            raise InputError(f"sample {sample.index} of {sample.task} is empty: there is nothing to read")
        size = int(model.get_input_embeddings().weight.shape[0])

        def tokens(text: str, special: bool) -> list[int]:
            if not text:
                return []
            return encode(tokenizer, [text], "sample", special=special, vocabulary=size)[0]

        plain = raw or sample.metric == "loss" or not has_template(tokenizer)
        context, question = sample.context, sample.question
        if not plain:
            context, question = as_turn(Chat(tokenizer), sample)
        made = cls(
            tokens(context, plain),
            tokens(question, plain and not context),
            tokens(sample.target, False),
        )
        made._check(sample, None if endless else max_positions(model))
        return made

    def before(self, cell: Cell) -> list[int]:
        """What is read before the cell's question is asked."""
        return self.context if cell.question == HIDDEN else self.context + self.question

    def total(self, sample: Sample) -> int:
        """Tokens with the longest answer."""
        more = len(self.target) if sample.metric == "loss" else sample.max_new_tokens
        return len(self.context) + len(self.question) + more

    def _check(self, sample: Sample, most: int | None) -> None:
        if sample.metric == "loss" and not (self.context and self.target):
            raise InputError(
                f"sample {sample.index} of {sample.task} has no context or no target: a loss needs both"
            )
        total = self.total(sample)
        if most is not None and total > most:
            raise InputError(
                f"sample {sample.index} of {sample.task} takes {total} tokens with its answer, the model has "
                f"{most} positions: give a length of at most {most}"
            )


def as_turn(chat: Chat, sample: Sample) -> tuple[str, str]:
    """The sample's context and question as the template writes them, in one turn of the user's; behind them
    the answer's turn begins.
    """
    if not sample.context:
        parts, _ = chat.prompt([sample.asked], None, closing=True)
        return "", parts[0].text + sample.answer_prefix.lstrip()
    parts, turn = chat.prompt([sample.context], None, closing=False)
    asked, _ = chat.question(sample.asked, turn, 1)
    return parts[0].text, asked[0].text + sample.answer_prefix.lstrip()


def max_positions(model: Any) -> int | None:
    """Positions that the model was made for; None where it has no limit."""
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None


@dataclass(frozen=True)
class Reading:
    """What a cell's policy has read before the question: the context, or with it a question that is seen."""

    tokens: list[int]
    cache: BudgetCache
    nbytes: int
    held: tuple[int, int]
    """Fewest and most slots in use in any KV head."""
    seconds: float

    @classmethod
    def of(cls, model: Any, prompt: Prompt, cell: Cell, total: int) -> Reading:
        """Read under the cell's policy and budget, with room for `total` tokens in a full cache."""
        cache = cache_for(model, cell, len(prompt.context), total)
        tokens = prompt.before(cell)
        clock = time.perf_counter()
        _read(Reader(model, cache, 1, 0), tokens)
        _wait(model)
        return cls(tokens, cache, cache.nbytes, held_range(cache, 0), time.perf_counter() - clock)


def run(
    model: Any,
    tokenizer: Any,
    sample: Sample,
    prompt: Prompt,
    cell: Cell,
    metric: Metric | None,
    *,
    stop_at_newline: bool = False,
    reading: Reading | None = None,
) -> Row:
    """Read the sample under the cell's policy and budget, answer greedily (or take the loss), and measure.

    Args:
        metric: None for the loss of the sample's target.
        reading: of the same cell and text, for another sample: a copy of its cache answers this one.
    """
    if reading is None:
        reading = Reading.of(model, prompt, cell, prompt.total(sample))
        cache = reading.cache
    else:
        assert reading.tokens == prompt.before(cell)
        cache = reading.cache.copy()
    reader = Reader(model, cache, 1, 0)
    clock = time.perf_counter()
    _read(reader, prompt.question if cell.question == HIDDEN else [])
    _wait(model)
    prefill, clock = reading.seconds + time.perf_counter() - clock, time.perf_counter()
    tokens: list[int] = []
    if metric is None:
        output, finish = "", "target"
        score = _loss(reader, prompt.target)
    else:
        tokens, finish = _answer(reader, tokenizer, sample.max_new_tokens, stop_at_newline)
        output = decode(tokenizer, tokens)
        if stop_at_newline:
            output = _first_line(output)
        score = float(metric(output, sample.answers))
    _wait(model)
    return Row(
        cell=cell,
        index=sample.index,
        score=score,
        metric=sample.metric,
        output=output,
        answers=list(sample.answers),
        context_tokens=len(prompt.context),
        new_tokens=len(prompt.target) if metric is None else len(tokens),
        depth=sample.depth,
        held_bytes=cache.nbytes,
        context_bytes=reading.nbytes,
        peak_bytes=cache.peak_nbytes,
        full_bytes=cache.full_nbytes,
        held_tokens=reading.held,
        prefill_seconds=prefill,
        decode_seconds=time.perf_counter() - clock,
        versions=versions(),
        extra={
            "question_tokens": len(prompt.question),
            "budget_tokens": cache.plan.tokens,
            "budget_bytes": cache.budget_nbytes,
            "finish": finish,
            "device": execution_device(model).type,
            "threads": torch.get_num_threads(),
        },
    )


def versions() -> dict[str, str]:
    """Of what computes."""
    import transformers

    import modicum

    return {
        "modicum": modicum.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def cache_for(model: Any, cell: Cell, context: int, total: int) -> BudgetCache:
    """An empty cache for a sample of `context` tokens, `total` with question and answer.

    Raises:
        BudgetError: the policy cannot work with the cell's budget; names the least.
    """
    policy = parse_policy(cell.policy)
    budget = Allowance.parse(cell.budget).budget(
        policy,
        context,
        total,
        chunk=total if cell.chunk is None else cell.chunk,
        n_sink=cell.n_sink or 0,
        recent=cell.recent or 0,
        evict_every=cell.evict_every or 1,
    )
    return BudgetCache(model, policy, budget, positions=cell.positions, store=cell.store, length=context)


def _read(reader: Reader, tokens: list[int]) -> None:
    if tokens:
        reader.take(Block.of([tokens], 0), Interrupt(), lambda _: None)


def _wait(model: Any) -> None:
    device = execution_device(model)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _answer(reader: Reader, tokenizer: Any, most: int, stop_at_newline: bool) -> tuple[list[int], str]:
    """The likeliest token again and again: no sampling or penalties, whatever the model's own settings."""
    ends = _ends(reader.model, tokenizer)
    tokens: list[int] = []
    while True:
        assert reader.transcript.logits is not None
        tokens.append(int(reader.transcript.logits[0].float().argmax()))
        if tokens[-1] in ends:
            return tokens, "stop"
        if stop_at_newline and "\n" in decode(tokenizer, tokens).lstrip():
            return tokens, "newline"
        if len(tokens) >= most:
            return tokens, "length"
        _read(reader, tokens[-1:])


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return frozenset([*ends, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])])


def _first_line(text: str) -> str:
    return text.lstrip().split("\n", 1)[0]


def _loss(reader: Reader, target: list[int]) -> float:
    """Mean cross-entropy of the target in nats, each token predicted from all before it; chunk by chunk."""
    return -float(log_likelihoods(reader, target)[0].mean())
