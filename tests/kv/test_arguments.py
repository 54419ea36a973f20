"""Arguments of a call that a budget cache cannot serve: each is refused by its name, legal ones are not."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import modicum
from modicum import BudgetCache, InputError
from modicum.compat import cache_kwargs
from modicum.kv.arguments import check_positions
from tests import zoo
from tests.driver import all_kept, check_limits, feed, pad_left

SMALL = {"chunk": 16, "n_sink": 2, "recent": 4}
PASSES_USE_CACHE = [name for name in zoo.ALL if not name.startswith(("gemma", "mistral-window"))]
"""Families whose attention is told `use_cache`."""


def new_cache(model: Any, policy: str = "keydiff", **more: Any) -> BudgetCache:
    return BudgetCache(model, policy, 20, **SMALL, **more)


# -- use_cache ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PASSES_USE_CACHE)
def test_use_cache_false_is_refused_before_anything_is_read(name: str) -> None:
    model, ids = zoo.build(name), zoo.tokens(1, 30)
    cache = new_cache(model)
    message = r"use_cache is False .*model\.generation_config\.use_cache .*set both model\.config\.use_cache "
    with pytest.raises(InputError, match=message):
        model.generate(ids, **cache_kwargs(model.generate, cache), max_new_tokens=3, use_cache=False)
    with torch.no_grad(), pytest.raises(InputError, match=message):
        model(ids, **cache_kwargs(model, cache), use_cache=False)
    assert cache.seen == 0
    model.config.use_cache = False  # as fine-tuned checkpoints have it
    with torch.no_grad(), pytest.raises(InputError, match=message):
        model(ids, **cache_kwargs(model, cache))
    model.generation_config.use_cache = False
    with pytest.raises(InputError, match=message):
        model.generate(ids, **cache_kwargs(model.generate, cache), max_new_tokens=3)
    out = model.generate(
        ids, **cache_kwargs(model.generate, cache), max_new_tokens=3, use_cache=True, do_sample=False
    )
    assert out.shape[1] == 33
    assert cache.seen == 32


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_use_cache_false_is_noticed_when_the_text_is_read_again(name: str) -> None:
    """These models do not tell their attention; their positions do, at the second step."""
    model = zoo.build(name)
    with pytest.raises(InputError, match=r"position_ids start again: .*use_cache=True"):
        model.generate(
            zoo.tokens(1, 30),
            **cache_kwargs(model.generate, new_cache(model)),
            max_new_tokens=3,
            use_cache=False,
        )


@pytest.mark.parametrize("beams", [1, 2])
def test_modicum_generate_reads_with_a_cache_whatever_the_checkpoint_says(beams: int) -> None:
    model, tokenizer = modicum.load("reference")
    text, config = "The number for red is 7. " * 20, model.generation_config
    how: dict[str, Any] = {"budget": 64, "chunk": 64, "max_new_tokens": 6}

    def answer() -> list[int]:
        settings = type(config)(num_beams=beams, do_sample=False, use_cache=config.use_cache)
        return modicum.generate(model, tokenizer, text, generation_config=settings, **how).tokens

    wanted = answer()
    model.config.use_cache = config.use_cache = False
    assert answer() == wanted


# -- positions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["keydiff", "snapkv(window=4)", "full"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("new", [1, 5])
def test_positions_that_start_again_are_refused_and_change_nothing(
    policy: str, static: bool, new: int
) -> None:
    model, ids = zoo.shared("llama"), zoo.tokens(2, 30)
    budget = 60 if policy == "full" else 20
    cache = BudgetCache(model, policy, budget, **SMALL, compile=static and policy != "full")
    feed(model, cache, ids, cuts=(27, 28, 29))
    before = all_kept(cache)
    more = zoo.tokens(2, new, seed=1)
    for first in (0, 19, 29):  # from the start, at the number held, one too low
        at = torch.arange(first, first + new)[None]
        with torch.no_grad(), pytest.raises(InputError, match=rf"has position {first}, .* seen 30 tokens"):
            model(more, **cache_kwargs(model, cache), position_ids=at, use_cache=True)
        assert all_kept(cache) == before
    with torch.no_grad():
        model(
            more, **cache_kwargs(model, cache), position_ids=torch.arange(30, 30 + new)[None], use_cache=True
        )
    assert cache.seen == 30 + new
    check_limits(cache)


def test_packed_sequences_are_refused() -> None:
    model, ids = zoo.shared("llama"), zoo.tokens(1, 6)
    at = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with torch.no_grad(), pytest.raises(InputError, match=r"fall from 2 to 0 within row 0 .*packed"):
        model(ids, **cache_kwargs(model, new_cache(model)), position_ids=at, use_cache=True)


def test_each_row_is_judged_by_its_own_tokens() -> None:
    model = zoo.shared("llama")
    ids, mask = pad_left([zoo.tokens(1, n, seed=n)[0] for n in (12, 7)])
    cache = new_cache(model)
    feed(model, cache, ids, mask)
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
    with torch.no_grad(), pytest.raises(InputError, match=r"row 0 of this call has position 7, .* seen 12"):
        model(
            zoo.tokens(2, 1),
            **cache_kwargs(model, cache),
            attention_mask=mask,
            position_ids=torch.tensor([[7]]),
        )
    with torch.no_grad():
        at = torch.tensor([[12], [7]])
        model(zoo.tokens(2, 1), **cache_kwargs(model, cache), attention_mask=mask, position_ids=at)
    assert cache.row_seen == (13, 8)


@pytest.mark.parametrize("name", zoo.ALL)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "more", [{}, {"num_beams": 2}, {"prefill_chunk_size": 7}, {"compiled": True}], ids=str
)
def test_what_generate_gives_is_accepted(name: str, padded: bool, more: dict[str, Any]) -> None:
    if "prefill_chunk_size" in more and transformers.__version__.startswith("5.2."):
        pytest.skip("transformers 5.2 gives every chunk the positions of the last")
    model, more = zoo.shared(name), dict(more)
    lengths = (30, 21, 4) if padded else (30, 30, 30)
    ids, mask = pad_left([zoo.tokens(1, n, seed=n)[0] for n in lengths])
    cache = new_cache(model, compile="auto" if more.pop("compiled", False) else False)
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, **more}
    out = model.generate(ids, **cache_kwargs(model.generate, cache), attention_mask=mask, **how)
    out = torch.cat([out, zoo.tokens(3, 4, seed=9)], 1)  # the next turn
    mask = torch.cat([mask, torch.ones(3, 9, dtype=torch.int64)], 1)
    if "num_beams" not in more:
        model.generate(out, **cache_kwargs(model.generate, cache), attention_mask=mask, **how)


def allowed(at: Tensor, told: Tensor, seen: list[int]) -> bool:
    """The rule, by loops: no token lies below the number of tokens seen, or below one before it."""
    for row, least in enumerate(seen):
        for column in range(told.shape[1]):
            if told[row, column]:
                place = int(at[row if len(at) > 1 else 0, column])
                if place < least:
                    return False
                least = place
    return True


def test_the_rule_for_positions_is_the_one_stated() -> None:
    rng = random.Random(0)
    verdicts = []
    for _ in range(2000):
        rows, columns = rng.randint(1, 3), rng.randint(1, 4)
        seen = [rng.randint(0, 3) for _ in range(rows)]
        lines = rng.choice([1, rows])
        at = torch.tensor([[rng.randint(0, 6) for _ in range(columns)] for _ in range(lines)]).sort(1).values
        if rng.random() < 0.3:
            at = at.flip(1)
        told = torch.tensor([[rng.random() < 0.8 for _ in range(columns)] for _ in range(rows)])
        mask = None if rng.random() < 0.3 else torch.cat([torch.ones(rows, 2), told.long()], 1)
        told = torch.ones_like(told) if mask is None else told
        try:
            check_positions(at, mask, seen, columns)
            verdicts.append(True)
        except InputError:
            verdicts.append(False)
        assert verdicts[-1] == allowed(at, told, seen), (at, mask, seen)
    assert 200 < sum(verdicts) < 1800


def test_several_positions_per_token_are_not_judged() -> None:
    check_positions(torch.zeros(3, 1, 4, dtype=torch.int64), None, (9,), 4)
    check_positions(None, None, (9,), 4)


# -- output_attentions -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in zoo.ALL if name != "mistral-window"])
def test_attention_maps_are_refused(name: str) -> None:
    model, ids = zoo.build(name, attention="eager"), zoo.tokens(1, 12)
    cache = new_cache(model)
    with torch.no_grad(), pytest.raises(InputError, match=r"output_attentions is True .*makes no"):
        model(ids, **cache_kwargs(model, cache), output_attentions=True)
    cache.reset()
    with pytest.raises(InputError, match="output_attentions is True"):
        model.generate(
            ids,
            **cache_kwargs(model.generate, cache),
            max_new_tokens=2,
            output_attentions=True,
            return_dict_in_generate=True,
        )
    cache.reset()
    feed(model, cache, ids)
    assert len(model(ids, output_attentions=True, use_cache=False).attentions) == len(cache.layers)


# -- padding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["keydiff", "h2o"])
def test_padding_on_the_right_takes_no_slot_if_the_mask_tells_it(policy: str) -> None:
    model, row = zoo.shared("llama"), zoo.tokens(1, 24)
    alone, told, untold = (BudgetCache(model, policy, 30, n_sink=2, recent=4) for _ in range(3))
    feed(model, alone, row)
    ids = torch.cat([row, torch.zeros(1, 6, dtype=torch.int64)], 1)
    feed(model, told, ids, torch.tensor([[1] * 24 + [0] * 6]))
    assert all_kept(told) == all_kept(alone)
    assert told.row_seen == (24,)
    feed(model, untold, ids)  # nobody can know: it is text
    assert untold.row_seen == (30,)
