"""modicum.generate, stream and prefill, on the embedded model."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from modicum.compat import cache_kwargs
from modicum.errors import CacheError, InputError, ModelError
from modicum.generation.generate import Generation, generate, prefill, stream
from modicum.kv.cache import BudgetCache
from modicum.loading import load
from tests.bounds import exactly
from tests.tiny_model import TINY_MODEL

ROOM = 512
"""A budget that everything here fits into."""
TIGHT: dict[str, Any] = {"budget": 64, "chunk": 16, "n_sink": 4, "recent": 8}
PROMPT = "Once upon a time, a girl named Mira sold fresh bread in the old harbour. She had a small dog."
ROWS = [PROMPT, "Tom had a red ball.", "The sun was"]


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return load(TINY_MODEL)


@pytest.fixture(scope="module")
def plain() -> Any:
    """The same weights without modicum's attention: the reference."""
    return load(TINY_MODEL)[0]


def reference(model: Any, tokenizer: Any, text: str, n: int, **settings: Any) -> list[int]:
    """New tokens by transformers alone."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids)
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=n,
        **cache_kwargs(model.generate, DynamicCache()),
        pad_token_id=2,
        **settings,
    )
    return out[0, ids.shape[1] :].tolist()


# -- what comes out is what transformers gives --


@pytest.mark.parametrize("chunk", [1, 7, 16, 512])
def test_greedy_is_transformers_own_when_all_fits(tiny: Any, plain: Any, chunk: int) -> None:
    answer = generate(*tiny, PROMPT, budget=ROOM, chunk=chunk, max_new_tokens=60)
    assert answer.tokens == reference(plain, tiny[1], PROMPT, 60)
    assert answer.text == tiny[1].decode(answer.tokens, skip_special_tokens=True)
    answer.cache.check_integrity()


def test_prefill_equals_one_call_of_transformers_under_a_tight_budget(tiny: Any) -> None:
    """The cuts are those that the engine makes by itself, so tokens and survivors agree."""
    model, tokenizer = tiny
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    cache = BudgetCache(model, **TIGHT)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), **cache_kwargs(model.generate, cache), max_new_tokens=30
    )
    answer = generate(model, tokenizer, PROMPT, max_new_tokens=30, **TIGHT)
    assert answer.tokens == out[0, ids.shape[1] :].tolist()
    # transformers leaves the last token out of the cache.
    with torch.no_grad():
        model(out[:, -1:], **cache_kwargs(model, cache))
    for layer in range(len(cache.layers)):
        left, right = cache.positions(layer), answer.cache.positions(layer)
        assert torch.equal(left.sort(-1).values, right.sort(-1).values)


SAMPLING = GenerationConfig(do_sample=True, temperature=0.8, top_p=0.9, top_k=20, repetition_penalty=1.2)


def test_sampling_is_transformers_own_and_repeatable(tiny: Any, plain: Any) -> None:
    def ours() -> list[int]:
        torch.manual_seed(7)
        return generate(*tiny, PROMPT, budget=ROOM, max_new_tokens=40, generation_config=SAMPLING).tokens

    first = ours()
    torch.manual_seed(7)
    assert first == reference(plain, tiny[1], PROMPT, 40, generation_config=SAMPLING)
    assert ours() == first
    torch.manual_seed(8)
    other = generate(*tiny, PROMPT, budget=ROOM, max_new_tokens=40, generation_config=SAMPLING).tokens
    assert other != first


def test_beams_are_transformers_own_and_the_cache_goes_on(tiny: Any, plain: Any) -> None:
    config = GenerationConfig(num_beams=3)
    answer = generate(*tiny, PROMPT, budget=ROOM, chunk=16, max_new_tokens=20, generation_config=config)
    assert answer.tokens == reference(plain, tiny[1], PROMPT, 20, num_beams=3)
    assert answer.finish_reason == "length"
    # The cache has read the chosen answer, and nothing of the beams that lost.
    assert answer.seen == answer.prompt_tokens + 20
    assert answer.cache.batch_size == 1
    greedy = generate(*tiny, cache=answer.cache, max_new_tokens=10)
    whole = torch.tensor([tiny[1](PROMPT)["input_ids"] + answer.tokens])
    out = plain.generate(whole, attention_mask=torch.ones_like(whole), max_new_tokens=10)
    assert greedy.tokens == out[0, whole.shape[1] :].tolist()


def test_beams_of_a_batch_under_a_tight_budget(tiny: Any) -> None:
    config = GenerationConfig(num_beams=2)
    batch = generate(*tiny, ROWS, max_new_tokens=25, generation_config=config, **TIGHT)
    for text, answer in zip(ROWS, batch, strict=True):
        alone = generate(*tiny, text, max_new_tokens=25, generation_config=config, **TIGHT)
        assert answer.tokens == alone.tokens
        assert answer.held == alone.held
    batch[0].cache.check_integrity()


# -- stopping --


def ending(tiny: Any, token: int) -> GenerationConfig:
    return GenerationConfig(eos_token_id=token, pad_token_id=0)


def test_stops_at_an_end_token_which_goes_into_tokens_and_cache(tiny: Any, plain: Any) -> None:
    whole = reference(plain, tiny[1], PROMPT, 40)
    end = whole[11]
    length = whole.index(end) + 1
    answer = generate(*tiny, PROMPT, budget=ROOM, max_new_tokens=40, generation_config=ending(tiny, end))
    assert answer.tokens == whole[:length]
    assert (answer.finish_reason, answer.seen) == ("stop", answer.prompt_tokens + length)
    config = ending(tiny, end)
    past = generate(
        *tiny, PROMPT, budget=ROOM, max_new_tokens=40, generation_config=config, stop_on_eos=False
    )
    assert (past.tokens, past.finish_reason) == (whole, "length")


def test_stops_at_a_stop_string(tiny: Any) -> None:
    config = GenerationConfig(stop_strings=["."])
    answer = generate(*tiny, PROMPT, budget=ROOM, max_new_tokens=60, generation_config=config)
    assert answer.text.endswith(".")
    assert answer.text.count(".") == 1
    assert answer.finish_reason == "stop"


def test_length_comes_from_the_argument_then_the_configuration_then_128(tiny: Any) -> None:
    config = GenerationConfig(max_new_tokens=5)
    assert len(generate(*tiny, PROMPT, generation_config=config).tokens) == 5
    assert len(generate(*tiny, PROMPT, generation_config=config, max_new_tokens=3).tokens) == 3
    assert len(generate(*tiny, PROMPT, stop_on_eos=False).tokens) == 128
    assert config.max_new_tokens == 5


# -- batches --


@pytest.mark.parametrize("policy", ["keydiff", "adakv+snapkv(window=8)", "streamingllm", "h2o"])
def test_a_row_is_itself(tiny: Any, policy: str) -> None:
    batch = generate(*tiny, ROWS, policy=policy, max_new_tokens=70, **TIGHT)
    cache = batch[0].cache
    cache.check_integrity()
    for row, text in enumerate(ROWS):
        alone = generate(*tiny, text, policy=policy, max_new_tokens=70, **TIGHT)
        got = batch[row]
        assert got.tokens == alone.tokens
        assert got.text == alone.text
        assert (got.seen, got.held, got.prompt_tokens) == (alone.seen, alone.held, alone.prompt_tokens)
        for layer in range(len(cache.layers)):
            for head, kept in enumerate(cache.positions(layer)[row]):
                mine = alone.cache.positions(layer)[0, head]
                assert kept[kept >= 0].sort().values.equal(mine[mine >= 0].sort().values)


def test_rows_that_end_early_keep_no_padding_and_go_on_as_they_would_alone(tiny: Any) -> None:
    """What follows the end of a row is padding, and must not push out what the row holds."""
    first = [generate(*tiny, text, max_new_tokens=40, **TIGHT).tokens for text in ROWS]
    config = ending(tiny, first[1][5])  # some row ends well before another
    batch = generate(*tiny, ROWS, max_new_tokens=40, generation_config=config, **TIGHT)
    assert len({len(answer.tokens) for answer in batch}) > 1
    more = generate(
        *tiny, [" Then she", " He was happy and", " One day"], cache=batch[0].cache, max_new_tokens=8
    )
    for row, text in enumerate(ROWS):
        alone = generate(*tiny, text, max_new_tokens=40, generation_config=config, **TIGHT)
        got = batch[row]
        assert (got.tokens, got.finish_reason, got.seen) == (alone.tokens, alone.finish_reason, alone.seen)
        turn = [" Then she", " He was happy and", " One day"][row]
        after = generate(*tiny, turn, cache=alone.cache, max_new_tokens=8)
        assert (more[row].tokens, more[row].held, more[row].seen) == (after.tokens, after.held, after.seen)


def test_a_batch_with_one_question(tiny: Any) -> None:
    batch = generate(*tiny, ROWS, question=" Then Tom", max_new_tokens=10, **TIGHT)
    for text, answer in zip(ROWS, batch, strict=True):
        alone = generate(*tiny, text, question=" Then Tom", max_new_tokens=10, **TIGHT)
        assert answer.tokens == alone.tokens
    assert [type(answer) for answer in generate(*tiny, [PROMPT], max_new_tokens=2)] == [Generation]


# -- questions and turns --

QUESTIONS = [" She saw a big", " Then Tom said", " The dog"]


def test_questions_are_answered_as_if_each_were_asked_alone(tiny: Any) -> None:
    together = generate(*tiny, PROMPT, question=QUESTIONS, max_new_tokens=12, **TIGHT)
    context = together[0].cache
    assert context.seen == len(tiny[1](PROMPT)["input_ids"])
    for question, answer in zip(QUESTIONS, together, strict=True):
        alone = generate(*tiny, PROMPT, question=question, max_new_tokens=12, **TIGHT)
        assert (answer.tokens, answer.seen, answer.held) == (alone.tokens, alone.seen, alone.held)
        assert answer.prompt_tokens == alone.prompt_tokens
        assert answer.cache is context
        by_hand = generate(*tiny, question=question, cache=context.copy(), max_new_tokens=12)
        assert by_hand.tokens == alone.tokens


def test_the_question_is_appended_after_compression(tiny: Any) -> None:
    """By hand: the context in one call, the question in the next."""
    model, tokenizer = tiny
    answer = generate(model, tokenizer, PROMPT, question=QUESTIONS[0], max_new_tokens=1, **TIGHT)
    cache = BudgetCache(model, **TIGHT)
    with torch.no_grad():
        model(tokenizer(PROMPT, return_tensors="pt")["input_ids"], **cache_kwargs(model, cache))
        ids = tokenizer(QUESTIONS[0], add_special_tokens=False, return_tensors="pt")["input_ids"]
        logits = model(ids, **cache_kwargs(model, cache)).logits
    assert answer.tokens == [int(logits[0, -1].argmax())]


def test_turns_equal_one_long_prompt_when_nothing_is_evicted(tiny: Any, plain: Any) -> None:
    model, tokenizer = tiny
    cache = None
    history: list[int] = []
    for turn, text in enumerate([PROMPT, " Tom said", " They went home and"]):
        answer = generate(model, tokenizer, text, cache=cache, budget=ROOM, chunk=16, max_new_tokens=15)
        cache = answer.cache
        history += tokenizer(text, add_special_tokens=turn == 0)["input_ids"]
        ids = torch.tensor([history])
        out = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=15)
        assert answer.tokens == out[0, len(history) :].tolist()
        history += answer.tokens
        assert cache.seen == answer.seen == len(history)


def test_going_on_without_a_prompt_is_having_asked_for_more(tiny: Any) -> None:
    whole = generate(*tiny, PROMPT, max_new_tokens=40, **TIGHT)
    part = generate(*tiny, PROMPT, max_new_tokens=15, **TIGHT)
    rest = generate(*tiny, cache=part.cache, max_new_tokens=25)
    assert part.tokens + rest.tokens == whole.tokens
    assert rest.prompt_tokens == 0
    assert rest.timings.prefill_tokens_per_second is None
    assert generate(*tiny, cache=prefill(*tiny, PROMPT, **TIGHT), max_new_tokens=40).tokens == whole.tokens


def test_samplers_see_the_history_of_earlier_turns(tiny: Any) -> None:
    """A repetition penalty must count tokens of earlier turns too."""
    config = GenerationConfig(repetition_penalty=1.5)
    turn = generate(*tiny, PROMPT, budget=ROOM, max_new_tokens=10)
    ids = torch.tensor([tiny[1](PROMPT + "")["input_ids"] + turn.tokens])
    tail = tiny[1](" Then", add_special_tokens=False)["input_ids"]
    whole = torch.cat([ids, torch.tensor([tail])], 1)
    model = load(TINY_MODEL)[0]
    out = model.generate(
        whole,
        attention_mask=torch.ones_like(whole),
        max_new_tokens=15,
        repetition_penalty=1.5,
        do_sample=False,
    )
    second = generate(*tiny, " Then", cache=turn.cache, max_new_tokens=15, generation_config=config)
    assert second.tokens == out[0, whole.shape[1] :].tolist()


def test_a_cache_fed_by_transformers_and_one_saved_go_on(tiny: Any, tmp_path: Any) -> None:
    model, tokenizer = tiny
    told = generate(model, tokenizer, ROWS, max_new_tokens=12, **TIGHT)[0].cache
    batch = tokenizer(ROWS, padding=True, return_tensors="pt")
    fed = BudgetCache(model, **TIGHT)
    model.generate(**batch, **cache_kwargs(model.generate, fed), max_new_tokens=13, min_new_tokens=13)
    told.save(tmp_path / "cache")
    saved = BudgetCache.load(tmp_path / "cache", model)
    turn = [" Then she", " He", " One day it was"]
    expected = [a.tokens for a in generate(model, tokenizer, turn, cache=told, max_new_tokens=8)]
    for cache in (fed, saved):
        assert [a.tokens for a in generate(model, tokenizer, turn, cache=cache, max_new_tokens=8)] == expected


def test_a_reset_cache_begins_anew(tiny: Any) -> None:
    answer = generate(*tiny, PROMPT, max_new_tokens=20, **TIGHT)
    answer.cache.reset()
    again = generate(*tiny, PROMPT, cache=answer.cache, max_new_tokens=20)
    assert again.tokens == answer.tokens
    assert again.seen == answer.seen


# -- streaming --


def test_pieces_join_to_the_text(tiny: Any) -> None:
    answer = generate(*tiny, PROMPT, max_new_tokens=60, **TIGHT)
    pieces = stream(*tiny, PROMPT, max_new_tokens=60, **TIGHT)
    joined = list(pieces)
    assert len(joined) > 10
    assert all(joined)
    assert "".join(joined) == answer.text == pieces.result.text
    assert pieces.result.finish_reason == "length"
    assert list(pieces) == []


def test_leaving_a_stream_early_leaves_a_cache_that_goes_on(tiny: Any) -> None:
    whole = generate(*tiny, PROMPT, max_new_tokens=40, **TIGHT)
    pieces = stream(*tiny, PROMPT, max_new_tokens=40, **TIGHT)
    for count, _ in enumerate(pieces):
        if count == 6:
            break
    part = pieces.result
    assert part.finish_reason == "interrupted"
    assert part.tokens == whole.tokens[: len(part.tokens)]
    assert 6 <= len(part.tokens) < 40
    assert part.seen == part.prompt_tokens + len(part.tokens)
    part.cache.check_integrity()
    rest = generate(*tiny, cache=part.cache, max_new_tokens=40 - len(part.tokens))
    assert part.tokens + rest.tokens == whole.tokens


def test_a_stream_never_begun_has_read_nothing(tiny: Any) -> None:
    result = stream(*tiny, PROMPT, max_new_tokens=5).result
    assert (result.text, result.finish_reason, result.seen) == ("", "interrupted", 0)


# -- what is reported --


def test_the_report_is_json_and_adds_up(tiny: Any) -> None:
    answer = generate(*tiny, PROMPT, max_new_tokens=50, **TIGHT)
    told = json.loads(json.dumps(answer.to_dict()))
    assert told["held"] == {"min": 64, "max": 64}
    memory = told["memory"]
    assert memory["nbytes"] <= memory["budget_nbytes"] <= memory["peak_nbytes"]
    assert memory["nbytes"] == answer.cache.nbytes
    assert told["seen"] == told["prompt_tokens"] + 50
    times = told["timings"]
    assert times["decode_tokens_per_second"] * times["decode_seconds"] == exactly(50)
    assert times["prefill_tokens_per_second"] * times["prefill_seconds"] == exactly(told["prompt_tokens"])
    assert (
        times["prefill_seconds"]
        <= times["time_to_first_token"]
        <= times["prefill_seconds"] + times["decode_seconds"]
    )


def test_progress_counts_the_chunks_cut_from_the_end(tiny: Any) -> None:
    calls: list[tuple[int, int]] = []
    n = len(tiny[1](PROMPT)["input_ids"])
    generate(*tiny, PROMPT, max_new_tokens=1, progress=lambda *at: calls.append(at), **TIGHT)
    assert calls == [(done, n) for done in range(n % 16 or 16, n + 1, 16)]


def test_positions_beyond_training_are_warned_of_once(tiny: Any) -> None:
    with pytest.warns(UserWarning, match="trained on positions up to 512") as caught:
        generate(*tiny, PROMPT * 20, max_new_tokens=3, **TIGHT)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(*tiny, PROMPT, max_new_tokens=3, **TIGHT)


# -- bad input --

BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": []}, "list of prompts is empty"),
    ({"prompt": ["a", ""]}, "prompt 1 is empty"),
    ({"prompt": b"bytes"}, "decode it first"),
    ({"prompt": 7}, "is int"),
    ({"prompt": ["a", 7]}, "prompt 1 is int"),
    ({"prompt": "\udcff"}, "not UTF-8"),
    ({"prompt": None}, "no prompt"),
    ({"prompt": None, "question": "Who?"}, "no prompt"),
    ({"question": ""}, "question is empty"),
    ({"question": 7}, "question is int"),
    ({"question": []}, "list of questions is empty"),
    ({"prompt": ["a", "b"], "question": ["c", "d"]}, "one question"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"max_new_tokens": -3}, "max_new_tokens is -3"),
    ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
    ({"max_new_tokens": True}, "max_new_tokens is True"),
    ({"cache": DynamicCache()}, "DynamicCache"),
    ({"generation_config": {"do_sample": True}}, "dict"),
    ({"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)}, "assisted"),
    ({"generation_config": GenerationConfig(num_beams=2, num_return_sequences=2)}, "num_return_sequences"),
    ({"generation_config": GenerationConfig(num_return_sequences=2, do_sample=True)}, "num_return_sequences"),
    ({"generation_config": GenerationConfig(penalty_alpha=0.6, top_k=4)}, "contrastive"),
    ({"generation_config": GenerationConfig(num_beams=2), "stop_on_eos": False}, "stop_on_eos"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_refused_with_the_reason(tiny: Any, change: dict[str, Any], message: str) -> None:
    arguments = {"prompt": "Once", "max_new_tokens": 4, **change}
    with pytest.raises(InputError, match=message):
        generate(*tiny, arguments.pop("prompt"), **arguments)


def test_streams_refuse_what_is_not_one_text(tiny: Any) -> None:
    for change in (
        {"prompt": ["a"]},
        {"question": ["a"]},
        {"generation_config": GenerationConfig(num_beams=2)},
    ):
        with pytest.raises(InputError, match=r"modicum\.generate"):
            stream(*tiny, **{"prompt": "Once", **change})  # type: ignore[arg-type]
    cache = prefill(*tiny, ["a", "b"])
    with pytest.raises(InputError, match="2 rows"):
        stream(*tiny, cache=cache)


def test_caches_that_do_not_fit_are_refused(tiny: Any) -> None:
    model, tokenizer = tiny
    cache = prefill(model, tokenizer, ["a", "b"])
    for prompt in ("one", ["one", "two", "three"]):
        with pytest.raises(InputError, match="2 rows"):
            generate(model, tokenizer, prompt, cache=cache)
    with pytest.raises(InputError, match="one row"):
        generate(model, tokenizer, cache=cache, question=["a", "b"])
    with pytest.raises(InputError, match="nothing to go on"):
        generate(model, tokenizer, cache=BudgetCache(model))
    with pytest.raises(InputError, match="no prompt"):
        prefill(model, tokenizer, None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="tokenizer is str"):
        generate(model, "tokenizer", "Once")
    with pytest.raises(ModelError):
        generate("model", tokenizer, "Once")  # type: ignore[call-overload]
    with pytest.raises(CacheError):
        generate(load(TINY_MODEL)[0], tokenizer, "Once", cache=prefill(model, tokenizer, "Once"))


def test_settings_that_transformers_refuses_are_input_errors(tiny: Any) -> None:
    config = GenerationConfig(do_sample=True)
    config.temperature = -1.0
    with pytest.raises(InputError, match="temperature"):
        generate(*tiny, PROMPT, generation_config=config)


def test_a_tokenizer_of_another_model_is_refused(tiny: Any) -> None:
    model, tokenizer = tiny

    class Foreign:
        pad_token_id, eos_token_id = 0, 1

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [1, 5000]}

        decode = tokenizer.decode

    with pytest.raises(InputError, match="token 5000"):
        generate(model, Foreign(), "Once")


@pytest.mark.parametrize(
    "imports",
    [
        "import modicum.generation.generate, modicum.loading, modicum; from modicum import generate, load",
        "from modicum import Generation, sample_text, generate, load",
        "import modicum; modicum.embedded(); modicum.stream; generate, load = modicum.generate, modicum.load",
    ],
)
def test_the_public_names_are_functions_whatever_was_imported_first(imports: str) -> None:
    """No module may take the place of a public function of its name."""
    subprocess.run([sys.executable, "-c", f"{imports}; generate.__code__, load.__code__"], check=True)
