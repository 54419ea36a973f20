"""Answers under a budget: chunked prefill, decoding, streaming, batches, questions and turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, overload

from transformers import GenerationConfig, PreTrainedModel

from modicum.errors import InputError
from modicum.generation.answer import Answer, Settings, Spent
from modicum.generation.chat import Message, check_rows
from modicum.generation.inputs import Block, check_count, check_texts
from modicum.generation.interrupt import Interrupt
from modicum.generation.opening import Opening, Prompt, Writing
from modicum.generation.reader import Reader
from modicum.generation.result import Generation, Memory, Timings
from modicum.generation.rules import settings, with_eos
from modicum.generation.stream import Stream
from modicum.kv.budget import Budget
from modicum.kv.cache import BudgetCache
from modicum.kv.policy import Policy
from modicum.kv.unwrap import unwrap
from modicum.progress import Progress, reporting

__all__ = ["Generation", "Memory", "Stream", "Timings", "generate", "prefill", "stream"]

_NEW_TOKENS = 128


@overload
def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str | Sequence[Message],
    *,
    question: str | None = None,
    **settings: Any,
) -> Generation: ...
@overload
def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str | Sequence[Message] | None = None,
    *,
    question: list[str],
    **settings: Any,
) -> list[Generation]: ...
@overload
def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: Sequence[str] | Sequence[Sequence[Message]],
    *,
    question: str | None = None,
    **settings: Any,
) -> list[Generation]: ...
@overload
def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: None = None,
    *,
    question: str | None = None,
    **settings: Any,
) -> Any: ...
def generate(  # type: ignore[misc]  # the overloads leave out the settings, which do not change the type
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: Prompt = None,
    *,
    policy: str | Policy | None = None,
    budget: int | str | Budget | None = None,
    max_new_tokens: int | None = None,
    question: str | Sequence[str] | None = None,
    cache: BudgetCache | None = None,
    generation_config: GenerationConfig | None = None,
    chunk: int = 512,
    n_sink: int = 4,
    recent: int = 32,
    evict_every: int = 1,
    positions: str = "original",
    store: str | None = None,
    compile: bool | Literal["auto"] = False,
    progress: Progress = None,
    stop_on_eos: bool = True,
    add_special_tokens: bool | None = None,
    chat: bool | None = None,
) -> Generation | list[Generation]:
    """Answer a prompt of any length with a cache that never holds more than its budget.

    The prompt is prefilled in chunks, cut from its end (first the odd piece, then whole chunks). Ctrl-C
    returns what there is, with the finish reason "interrupted".

    Args:
        model: a transformers causal LM; or one with PEFT adapters inside of its layers, compiled as a whole
            (it runs uncompiled here: see `compile`), or in a parallel wrapper on one device.
        prompt: text, or a list of messages (dicts with "role" and "content"); or a list of either, answered
            as one batch, each as it would be alone. None to go on with `cache`.
        policy, budget, chunk, n_sink, recent, evict_every, positions, store, compile: of a new `BudgetCache`
            (a budget such as "12.5%" is that share of the prompt); not read with `cache`. None is what the
            model's folder says (`modicum fit`), else "auto", 2,048 tokens and "model".
        max_new_tokens: by default what `generation_config` says, else 128.
        question: text added after the prompt has been compressed, without special tokens; by a chat template
            inside the user's turn, after an empty line unless there is white space. With a list, the prompt
            is compressed once and every question answered from a copy; the answers' `cache` is then the
            compressed prompt, and their timings count its prefill as their own.
        cache: goes on from what this cache has read; it is changed in place. By a chat template, a prompt
            goes on with the user's turn where `prefill` has left it open, and after an answer it is the next
            turn.
        generation_config: sampling, beams, penalties, stop strings; by default the model's own.
        progress: called with (tokens done, tokens in all) during the prefill; True for a bar on stderr.
        stop_on_eos: False to go on past end-of-sequence tokens.
        add_special_tokens: whether texts get the tokenizer's (BOS); by default only at the start of a cache.
            To give it turns the chat template off, which has special tokens of its own.
        chat: whether texts are turns by the tokenizer's chat template, the answer's header after them, and
            its end-of-turn token (beside the model's own) the end of the answer. None: where the tokenizer
            has a template, and the cache has not read text without it. Messages need a template.

    Returns:
        One `Generation`, or a list of them where a list was given (or `cache` holds several rows).

    Raises:
        InputError: a text, a setting or a cache that cannot be used; says what to give instead.
    """
    model = unwrap(model)
    many = question is not None and not isinstance(question, str)
    if many and prompt is not None and not check_rows(prompt)[1]:
        raise InputError("a list of prompts goes with one question: ask the questions one after the other")
    opening = Opening.of(
        model,
        tokenizer,
        prompt,
        cache,
        _builder(model, policy, budget, chunk, n_sink, recent, evict_every, positions, store, compile),
        config=generation_config,
        writing=Writing(add_special_tokens, chat),
        closing=question is None,
    )
    chosen = _settings(opening, generation_config, max_new_tokens, stop_on_eos, progress)
    texts = check_texts(question, "question") if many else [question] if isinstance(question, str) else []
    asked = [opening.question(text) for text in texts]
    opening.warn(asked, chosen.new_tokens)
    if many:
        return _answer_all(opening, asked, chosen)
    answer = _answer(opening, asked, chosen)
    with answer.interrupt:
        for _ in answer.steps():
            pass
    results = answer.results()
    return results[0] if opening.alone else results


def stream(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str | Sequence[Message] | None = None,
    *,
    policy: str | Policy | None = None,
    budget: int | str | Budget | None = None,
    max_new_tokens: int | None = None,
    question: str | None = None,
    cache: BudgetCache | None = None,
    generation_config: GenerationConfig | None = None,
    chunk: int = 512,
    n_sink: int = 4,
    recent: int = 32,
    evict_every: int = 1,
    positions: str = "original",
    store: str | None = None,
    compile: bool | Literal["auto"] = False,
    progress: Progress = None,
    stop_on_eos: bool = True,
    add_special_tokens: bool | None = None,
    chat: bool | None = None,
) -> Stream:
    """Like `generate` for one prompt (text or messages), but hands out the text as it comes.

    Returns:
        An iterator of text pieces; its `result` is the `Generation`. Nothing runs in the background: the work
        is done as pieces are asked for, and leaving early is enough to stop.
    """
    model = unwrap(model)
    if prompt is not None and not check_rows(prompt)[1]:
        raise InputError("a stream takes one prompt, not a list of them: use modicum.generate")
    if question is not None and not isinstance(question, str | bytes):
        raise InputError(f"a stream takes one question, not {type(question).__name__}: use modicum.generate")
    opening = Opening.of(
        model,
        tokenizer,
        prompt,
        cache,
        _builder(model, policy, budget, chunk, n_sink, recent, evict_every, positions, store, compile),
        config=generation_config,
        writing=Writing(add_special_tokens, chat),
        closing=question is None,
    )
    if not opening.alone:
        raise InputError(
            f"the cache holds {opening.reader.rows} rows, a stream is of one: use modicum.generate"
        )
    chosen = _settings(opening, generation_config, max_new_tokens, stop_on_eos, progress)
    asked = [] if question is None else [opening.question(question)]
    opening.warn(asked, chosen.new_tokens)
    answer = _answer(opening, asked, chosen)
    if answer.rules.beams > 1:
        raise InputError("beam search knows its text only at the end: use modicum.generate, or num_beams=1")
    return Stream(answer)


def prefill(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str | Sequence[str] | Sequence[Message] | Sequence[Sequence[Message]],
    *,
    policy: str | Policy | None = None,
    budget: int | str | Budget | None = None,
    cache: BudgetCache | None = None,
    chunk: int = 512,
    n_sink: int = 4,
    recent: int = 32,
    evict_every: int = 1,
    positions: str = "original",
    store: str | None = None,
    compile: bool | Literal["auto"] = False,
    progress: Progress = None,
    add_special_tokens: bool | None = None,
    chat: bool | None = None,
) -> BudgetCache:
    """Read a prompt (or a batch of them) in chunks and return the compressed cache, to ask questions of.

    By a chat template (see `generate`) the user's turn stays open: a question, or more text, goes on with it.

    Raises:
        InputError: as `generate`.
        KeyboardInterrupt: Ctrl-C, at the end of a chunk.
    """
    model = unwrap(model)
    if prompt is None:
        raise InputError("there is no prompt: give the text to read")
    opening = Opening.of(
        model,
        tokenizer,
        prompt,
        cache,
        _builder(model, policy, budget, chunk, n_sink, recent, evict_every, positions, store, compile),
        writing=Writing(add_special_tokens, chat),
    )
    opening.warn([], 0)
    interrupt = Interrupt()
    _read(opening, interrupt, progress)
    if interrupt.asked:
        raise KeyboardInterrupt
    return opening.reader.cache


def _builder(
    model: PreTrainedModel, policy: str | Policy | None, budget: int | str | Budget | None, *settings: Any
) -> Callable[[int | None], BudgetCache]:
    """Of a new cache for a text of so many tokens; settings are chunk, n_sink, recent, evict_every,
    positions, store, compile.
    """
    names = ("chunk", "n_sink", "recent", "evict_every", "positions", "store", "compile")
    make = partial(BudgetCache, model, policy, budget, **dict(zip(names, settings, strict=True)))
    return lambda length: make(length=length)


def _settings(
    opening: Opening,
    config: GenerationConfig | None,
    max_new_tokens: int | None,
    stop_on_eos: bool,
    progress: Progress,
) -> Settings:
    if max_new_tokens is None:
        given = opening.reader.model.generation_config if config is None else config
        max_new_tokens = getattr(given, "max_new_tokens", None) or _NEW_TOKENS
    check_count(max_new_tokens, "max_new_tokens")
    reader = opening.reader
    made = settings(reader.model, opening.tokenizer, config, max_new_tokens, reader.pad)
    stop = None if opening.chat is None else opening.chat.stop_token
    if stop is not None and getattr(config, "eos_token_id", None) is None:
        made.eos_token_id = with_eos(made, reader.model, stop)
    return Settings(opening.tokenizer, made, stop_on_eos, progress)


def _answer(opening: Opening, asked: list[Block], chosen: Settings) -> Answer:
    blocks = asked if opening.prompt is None else [opening.prompt, *asked]
    return Answer(opening.reader, blocks, chosen, Interrupt())


def _answer_all(opening: Opening, asked: list[Block], chosen: Settings) -> list[Generation]:
    """Compress the prompt once, then answer every question from a copy."""
    reader = opening.reader
    if reader.rows > 1:
        raise InputError(
            f"a list of questions goes with one row, the cache holds {reader.rows}: ask them one by one"
        )
    interrupt, results = Interrupt(), []
    start = time.perf_counter()
    _read(opening, interrupt, chosen.progress)
    spent = Spent(time.perf_counter() - start, reader.taken)
    for block in asked:
        work = Reader(reader.model, reader.cache.copy(), 1, reader.pad)
        answer = Answer(work, [block], replace(chosen, progress=None), interrupt, spent)
        with interrupt:
            for _ in answer.steps():
                pass
        # The copy is done with: holding one per question would be more than the budget.
        results.append(replace(answer.results()[0], cache=reader.cache))
    return results


def _read(opening: Opening, interrupt: Interrupt, progress: Progress) -> None:
    if opening.prompt is None:
        return
    with interrupt, reporting(progress, opening.prompt.ids.shape[1]) as tell:
        opening.reader.take(opening.prompt, interrupt, tell)
