"""One sample: the same tokens everywhere, answers as from generate, losses as from a full forward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import modicum
from modicum.compat import cache_kwargs
from modicum.errors import InputError
from modicum.evaluation.grid import Grid
from modicum.evaluation.row import Cell, Row
from modicum.evaluation.runner import Prompt, run
from modicum.loading import load
from modicum.tasks import parse_task
from modicum.tasks.sample import Sample
from tests import zoo
from tests.bounds import logits_bound
from tests.evaluation.colours import Colours, Continued, has
from tests.generation.test_chat import CHATML, letters
from tests.tiny_model import TINY_MODEL

TIGHT = {"chunk": 32, "recent": 8, "n_sink": 4}


def cell(policy: str = "keydiff", budget: str = "48", question: str = "hidden", **more: Any) -> Cell:
    grid = Grid(
        models=(str(TINY_MODEL),),
        policies=(policy,),
        budgets=(budget,),
        tasks=("colours",),
        questions=(question,),
        **TIGHT | more,
    )
    return grid.cells("tiny", "float32", Colours(), 200, 0)[0]


def answered(tiny: Any, sample: Sample, at: Cell, **more: Any) -> Row:
    model, tokenizer = tiny
    return run(model, tokenizer, sample, Prompt.of(sample, model, tokenizer), at, has, **more)


@pytest.fixture(scope="module")
def sample(tiny: Any) -> Sample:
    return replace(Colours().sample(1, 200, tiny[1]), max_new_tokens=20)


def test_a_hidden_question_is_answered_as_generate_answers_it(tiny: Any, sample: Sample) -> None:
    row = answered(tiny, sample, cell("snapkv(window=8)"))
    expected = modicum.generate(
        *tiny,
        sample.context,
        question=sample.question,
        policy="snapkv(window=8)",
        budget=48,
        max_new_tokens=20,
        **TIGHT,
    )
    assert row.output == expected.text
    assert row.context_tokens + row.extra["question_tokens"] == expected.prompt_tokens
    assert row.new_tokens == len(expected.tokens)
    assert (row.extra["finish"], row.held_bytes) == (expected.finish_reason, expected.memory.nbytes)
    assert row.held_tokens == (48, 48)
    assert row.context_bytes == row.held_bytes <= row.extra["budget_bytes"] < row.full_bytes
    assert row.held_bytes < row.peak_bytes == expected.memory.peak_nbytes


def test_a_seen_question_is_read_with_its_context_and_has_the_same_tokens(tiny: Any, sample: Sample) -> None:
    model, tokenizer = tiny
    prompt = Prompt.of(sample, model, tokenizer)
    ids = torch.tensor([prompt.context + prompt.question])
    cache = modicum.BudgetCache(model, "h2o", 48, **TIGHT)
    new = model.generate(
        ids,
        **cache_kwargs(model.generate, cache),
        max_new_tokens=20,
        do_sample=False,
        attention_mask=torch.ones_like(ids),
    )[0, ids.shape[1] :]
    row = answered(tiny, sample, cell("h2o", question="seen"))
    assert row.output == tokenizer.decode(new, skip_special_tokens=True)


def test_a_chat_template_writes_context_and_question_as_one_turn_and_the_answer_begins_the_next() -> None:
    """Unless asked for the text alone; a loss is always of the text alone."""
    model, tokenizer = zoo.build("llama"), letters(CHATML)
    plain = Sample(
        "own", 0, "Bears sleep.", "\nWho? They are", ("bears",), "in", 4, answer_prefix=" They are"
    )
    turn = {"role": "user", "content": "Bears sleep.\nWho?"}
    header = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    prompt = Prompt.of(plain, model, tokenizer)
    assert tokenizer.decode(prompt.context + prompt.question) == header + "They are"
    assert tokenizer.decode(prompt.context).endswith("Bears sleep.")
    alone = Prompt.of(replace(plain, context=""), model, tokenizer)
    only = tokenizer.apply_chat_template(
        [{"role": "user", "content": "\nWho?"}], tokenize=False, add_generation_prompt=True
    )
    assert (alone.context, tokenizer.decode(alone.question)) == ([], only + "They are")
    raw = Prompt.of(plain, model, tokenizer, raw=True)
    assert tokenizer.decode(raw.context + raw.question) == "<s>Bears sleep.\nWho? They are"
    loss = replace(plain, question="", answer_prefix="", metric="loss", target="They snore.")
    assert tokenizer.decode(Prompt.of(loss, model, tokenizer).context) == "<s>Bears sleep."


def test_seeing_the_question_changes_what_is_kept(tiny: Any) -> None:
    samples = [Colours().sample(index, 120, tiny[1]) for index in range(4)]
    hidden, seen = ([answered(tiny, s, cell(question=q)).output for s in samples] for q in ("hidden", "seen"))
    assert hidden != seen


def test_the_full_cache_answers_as_transformers_own_in_both_modes(tiny: Any, sample: Sample) -> None:
    model, tokenizer = tiny
    prompt = Prompt.of(sample, model, tokenizer)
    ids = torch.tensor([prompt.context + prompt.question])
    new = model.generate(ids, max_new_tokens=20, do_sample=False, attention_mask=torch.ones_like(ids))
    for mode in ("hidden", "seen"):
        for chunk in (32, None):
            row = answered(tiny, sample, cell("full", "full", mode, chunk=chunk))
            assert row.output == tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
            asked = len(prompt.question) if mode == "seen" else 0
            assert row.held_tokens == (len(prompt.context) + asked,) * 2
            assert row.held_bytes >= row.full_bytes


def test_all_at_once_evicts_once(tiny: Any, sample: Sample) -> None:
    chunked, whole = (answered(tiny, sample, cell("h2o", chunk=chunk)) for chunk in (32, None))
    assert chunked.peak_bytes < whole.peak_bytes
    assert chunked.held_bytes == whole.held_bytes


def test_the_loss_of_the_full_cache_is_that_of_one_forward(tiny: Any) -> None:
    model, tokenizer = tiny
    sample = Continued().sample(0, 200, tokenizer)
    prompt = Prompt.of(sample, model, tokenizer)
    n = len(prompt.context)
    with torch.no_grad():
        logits = model(torch.tensor([prompt.context + prompt.target])).logits[0]
    expected = float(F.cross_entropy(logits[n - 1 : -1], torch.tensor(prompt.target)))
    for chunk in (4, 7, 512, None):
        row = run(model, tokenizer, sample, prompt, cell("full", "full", chunk=chunk), None)
        assert abs(row.score - expected) <= 2 * logits_bound(
            model, logits
        )  # log-softmax moves by twice its logits
        assert (row.metric, row.new_tokens, row.output) == ("loss", len(prompt.target), "")
    squeezed = run(model, tokenizer, sample, prompt, cell("random", "16"), None)
    assert abs(squeezed.score - expected) > 0.05  # up or down: the weights are random
    assert squeezed.held_tokens == (16, 16)


def test_a_loss_of_a_single_token(tiny: Any) -> None:
    model, tokenizer = tiny
    sample = Continued().sample(0, 200, tokenizer)
    prompt = Prompt.of(sample, model, tokenizer)
    prompt = replace(prompt, target=prompt.target[:1])
    with torch.no_grad():
        last = model(torch.tensor([prompt.context])).logits[0, -1]
    row = run(model, tokenizer, sample, prompt, cell("full", "full"), None)
    bound = 2 * logits_bound(model, last[None], tokens=len(prompt.context))
    assert abs(row.score + float(last.log_softmax(-1)[prompt.target[0]])) <= bound


def test_answers_end_at_the_end_token(tiny: Any, sample: Sample) -> None:
    model, tokenizer = tiny
    prompt = Prompt.of(sample, model, tokenizer)
    ids = torch.tensor([prompt.context + prompt.question])
    new = model.generate(ids, max_new_tokens=20, do_sample=False, attention_mask=torch.ones_like(ids))
    tokens = new[0, ids.shape[1] :].tolist()
    end = tokens[4]
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [before, end]
    try:
        row = answered(tiny, sample, cell("full", "full"))
    finally:
        model.generation_config.eos_token_id = before
    assert (row.new_tokens, row.extra["finish"]) == (tokens.index(end) + 1, "stop")


def test_answers_end_at_a_newline_if_asked() -> None:
    """After its answer the reference model goes to a new line and asks again."""
    reference = load("reference")
    (task,) = parse_task("niah_single_1:max_new_tokens=40")
    sample = task.sample(0, 300, reference[1])
    whole = answered(reference, sample, cell("full", "full"))
    assert "\n" in whole.output.strip()
    cut = answered(reference, sample, cell("full", "full"), stop_at_newline=True)
    assert cut.output == whole.output.lstrip().split("\n")[0]
    assert (cut.extra["finish"], cut.new_tokens < whole.new_tokens) == ("newline", True)


def test_what_cannot_be_run_is_refused(tiny: Any, sample: Sample) -> None:
    model, tokenizer = tiny
    with pytest.raises(InputError, match="512 positions: give a length of at most 512"):
        Prompt.of(replace(sample, context=sample.context * 10), model, tokenizer)
    with pytest.raises(InputError, match="nothing to read"):
        Prompt.of(replace(sample, context="", question=""), model, tokenizer)
    with pytest.raises(InputError, match="target"):
        Prompt.of(replace(sample, metric="loss"), model, tokenizer)


def test_a_question_without_context_is_a_prompt(tiny: Any, sample: Sample) -> None:
    row = answered(tiny, replace(sample, context=""), cell())
    expected = modicum.generate(*tiny, sample.question, budget=48, max_new_tokens=20, **TIGHT)
    assert row.output == expected.text
    assert row.context_tokens == 0
