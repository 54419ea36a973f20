"""Ctrl-C, at the boundaries of tokens and chunks."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from transformers import GenerationConfig

from modicum.generation.generate import generate, prefill, stream
from modicum.generation.interrupt import Interrupt
from modicum.kv.call import cuts
from modicum.loading import load
from tests.tiny_model import TINY_MODEL

TIGHT: dict[str, Any] = {"budget": 64, "chunk": 16, "n_sink": 4, "recent": 8}
PROMPT = "Once upon a time, a girl named Mira sold fresh bread in the old harbour. One day she."


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    model, tokenizer = load(TINY_MODEL)
    # Probes the heads, so that the calls counted below are those of chunks and tokens.
    prefill(model, tokenizer, PROMPT, **TIGHT)
    return model, tokenizer


@pytest.fixture(autouse=True)
def _python_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@contextmanager
def pressed_in_call(model: Any, *numbers: int) -> Iterator[None]:
    """Ctrl-C in the middle of these calls of the model, between two layers."""
    calls = 0

    def press(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls in numbers:
            signal.raise_signal(signal.SIGINT)

    hook = model.model.layers[2].register_forward_pre_hook(press)
    try:
        yield
    finally:
        hook.remove()


def test_decoding_stops_after_the_token_at_hand(tiny: Any) -> None:
    model, tokenizer = tiny
    whole = generate(model, tokenizer, PROMPT, max_new_tokens=30, **TIGHT)
    with pressed_in_call(model, len(cuts(whole.prompt_tokens, 16)) + 5):
        part = generate(model, tokenizer, PROMPT, max_new_tokens=30, **TIGHT)
    assert part.finish_reason == "interrupted"
    assert part.tokens == whole.tokens[:5]
    assert part.seen == part.prompt_tokens + 5
    part.cache.check_integrity()
    rest = generate(model, tokenizer, cache=part.cache, max_new_tokens=25)
    assert part.tokens + rest.tokens == whole.tokens


def test_a_stream_ends_with_what_there_is(tiny: Any) -> None:
    model, tokenizer = tiny
    whole = generate(model, tokenizer, PROMPT, max_new_tokens=30, **TIGHT)
    pieces = stream(model, tokenizer, PROMPT, max_new_tokens=30, **TIGHT)
    with pressed_in_call(model, 9):
        text = "".join(pieces)
    assert pieces.result.finish_reason == "interrupted"
    assert text == pieces.result.text
    assert whole.text.startswith(text.rstrip("\N{REPLACEMENT CHARACTER}"))
    pieces.result.cache.check_integrity()


def test_prefill_stops_after_the_chunk_at_hand(tiny: Any) -> None:
    model, tokenizer = tiny
    with pressed_in_call(model, 2):
        part = generate(model, tokenizer, PROMPT, max_new_tokens=5, **TIGHT)
    (_, first), (_, second) = cuts(part.prompt_tokens, 16)[:2]
    assert first < 16
    assert (part.text, part.finish_reason, part.seen) == ("", "interrupted", second)
    assert part.timings.time_to_first_token is None
    part.cache.check_integrity()
    with pressed_in_call(model, 2), pytest.raises(KeyboardInterrupt):
        prefill(model, tokenizer, PROMPT, **TIGHT)


def test_questions_not_reached_are_said_to_be_interrupted(tiny: Any) -> None:
    model, tokenizer = tiny
    context = prefill(model, tokenizer, PROMPT, **TIGHT)
    with pressed_in_call(model, 4):
        first, second = generate(model, tokenizer, cache=context, question=[" She", " Tom"], max_new_tokens=8)
    assert first.finish_reason == second.finish_reason == "interrupted"
    assert 0 < len(first.tokens) < 8
    assert second.tokens == []
    assert context.seen == prefill(model, tokenizer, PROMPT, **TIGHT).seen


def test_beams_stop_with_the_best_so_far(tiny: Any) -> None:
    model, tokenizer = tiny
    config = GenerationConfig(num_beams=2)
    with pressed_in_call(model, 12):
        part = generate(model, tokenizer, PROMPT, max_new_tokens=30, generation_config=config, **TIGHT)
    assert part.finish_reason == "interrupted"
    assert 0 < len(part.tokens) < 30
    assert part.seen == part.prompt_tokens + len(part.tokens)
    part.cache.check_integrity()


def test_a_second_press_does_not_wait(tiny: Any) -> None:
    model, tokenizer = tiny
    with pressed_in_call(model, 1), pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, PROMPT, progress=lambda *_: signal.raise_signal(signal.SIGINT), **TIGHT)


def test_a_handler_of_the_program_stays() -> None:
    pressed: list[int] = []

    def own(number: int, frame: object) -> None:
        pressed.append(number)

    signal.signal(signal.SIGINT, own)
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
    assert pressed == [signal.SIGINT]
    assert not interrupt.asked
    assert signal.getsignal(signal.SIGINT) is own
    signal.signal(signal.SIGINT, signal.default_int_handler)
