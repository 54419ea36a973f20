"""Chat templates: the model reads what the tokenizer's template writes, in one piece or in several."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

import modicum
from modicum.cli import app
from modicum.cli.run import _task_sample
from modicum.compat import cache_kwargs
from modicum.errors import InputError
from modicum.evaluation.runner import Prompt
from modicum.tasks.sample import Sample
from tests import zoo

SPECIAL = ["<unk>", "<s>", "</s>", "<|begin|>", "<|end|>"]
BOS, EOS, END = 1, 2, 4
CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|begin|>system\nBe kind.<|end|>\n{% endif %}"
    "<|begin|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)
TRIMMED = (
    "{{ bos_token }}{% for m in messages %}<|begin|>{{ m.role }}\n\n{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n\n{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate.') }}{% endif %}"
    "{% if m.role == 'user' %}[Q] {{ m.content }} [/Q]{% else %}{{ m.content }} {{ eos_token }}{% endif %}"
    "{% endfor %}"
)
SHOUTED = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
TAMED = "{% for m in messages %}{{ m.content | replace('bear', 'dog') }}{% endfor %}"
TWICE = "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}"
TEMPLATES = {"chatml": CHATML, "trimmed": TRIMMED, "brackets": BRACKETS}
MODEL_SETTINGS: dict[str, Any] = {"budget": 400, "max_new_tokens": 1}
TIGHT: dict[str, Any] = {"budget": 64, "chunk": 16, "n_sink": 4, "recent": 8, "max_new_tokens": 6}
# The model's vocabulary is larger than the tokenizer's, which has 101 tokens.
LETTERS_ALONE = GenerationConfig(suppress_tokens=[*range(5), *range(101, zoo.VOCAB)], pad_token_id=0)

each = pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)


def letters(template: str | None) -> Any:
    """One token per character, so that where a text is cut changes no token; a BOS in front, as many add."""
    characters = ["\n", *map(chr, range(32, 127))]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *characters])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.add_special_tokens(SPECIAL)
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|begin|>", "<|end|>"],
        chat_template=template,
        padding_side="left",
    )


@pytest.fixture(scope="module")
def model() -> Any:
    return zoo.build("llama")


@pytest.fixture
def read(model: Any) -> Any:
    """Tells what token ids the model was given since it was last asked: [rows][tokens]."""
    columns: list[torch.Tensor] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        # A new cache may look at the model in a call of its own.
        if any(isinstance(value, modicum.BudgetCache) for value in kwargs.values()):
            columns.append(kwargs["input_ids"])

    hook = model.register_forward_pre_hook(note, with_kwargs=True)

    def told() -> list[list[int]]:
        ids: list[list[int]] = torch.cat(columns, dim=1).tolist()
        columns.clear()
        return ids

    yield told
    hook.remove()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def written(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """The template's own tokens."""
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    return ids


CONVERSATIONS = [
    [user("Who is the bear?")],
    [user("  white space around \n")],
    [user("One."), said("Two."), user("Three.")],
    [{"role": "system", "content": "Be brief."}, user("Who?")],
]


@each
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["user", "spaces", "turns", "system"])
def test_messages_are_read_as_the_template_writes_them(
    template: str, messages: list[dict[str, str]], model: Any, read: Callable[[], list[list[int]]]
) -> None:
    tokenizer = letters(template)
    if template == BRACKETS and messages[0]["role"] == "system":
        with pytest.raises(InputError, match=r"template refuses the messages: .*Roles must alternate"):
            modicum.generate(model, tokenizer, messages)
        return
    answer = modicum.generate(model, tokenizer, messages, **MODEL_SETTINGS)
    expected = written(tokenizer, messages)
    assert read()[0] == expected + answer.tokens
    assert expected.count(BOS) <= 1
    assert answer.prompt_tokens == len(expected)
    assert "".join(modicum.stream(model, tokenizer, messages, **MODEL_SETTINGS)) == answer.text
    if len(messages) == 1:  # a text is the user's message
        read()
        modicum.generate(model, tokenizer, messages[0]["content"], **MODEL_SETTINGS)
        assert read()[0] == expected + answer.tokens


JOINED = [
    ("The bear.", "Who?", "The bear.\n\nWho?"),
    ("The bear.\n", "Who?", "The bear.\nWho?"),
    ("The bear.", " Who?", "The bear. Who?"),
    ("  The bear. ", "Who?\n ", "  The bear. Who?\n "),
]


@each
@pytest.mark.parametrize(("context", "question", "text"), JOINED)
def test_a_question_is_in_the_same_turn_as_its_context(
    template: str, context: str, question: str, text: str, model: Any, read: Any, tmp_path: Path
) -> None:
    """The context and the question, joined, are what the template makes of one message with both."""
    tokenizer = letters(template)
    expected = written(tokenizer, [user(text)])
    answer = modicum.generate(model, tokenizer, context, question=question, **MODEL_SETTINGS)
    assert read()[0] == expected + answer.tokens
    cache = modicum.prefill(model, tokenizer, [user(context)], budget=400)
    begun = read()[0]
    assert begun == expected[: len(begun)]
    assert len(begun) >= len(context.strip())
    cache.save(tmp_path / "cache")
    for ready in (cache.copy(), modicum.BudgetCache.load(tmp_path / "cache", model), cache):
        same = modicum.generate(model, tokenizer, question=question, cache=ready, max_new_tokens=1)
        assert begun + read()[0] == expected + answer.tokens
        assert same.tokens == answer.tokens


@each
def test_several_questions_of_one_context(template: str, model: Any) -> None:
    tokenizer = letters(template)
    questions = ["Who is the bear?", " Where?"]
    together = modicum.generate(model, tokenizer, "The bear. " * 9, question=questions, **TIGHT)
    for question, answer in zip(questions, together, strict=True):
        alone = modicum.generate(model, tokenizer, "The bear. " * 9, question=question, **TIGHT)
        assert (answer.tokens, answer.seen, answer.held) == (alone.tokens, alone.seen, alone.held)


@each
def test_more_text_goes_on_with_the_turn_that_prefill_left_open(template: str, model: Any, read: Any) -> None:
    tokenizer = letters(template)
    cache = modicum.prefill(model, tokenizer, "One. ", budget=400)
    modicum.prefill(model, tokenizer, "Two. ", cache=cache)
    answer = modicum.generate(model, tokenizer, cache=cache, max_new_tokens=1)
    # The template cannot take back the space that stood at the end of what was read.
    expected = written(tokenizer, [user("One. Two." if template == TRIMMED else "One. Two. ")])
    told = read()[0]
    if template == TRIMMED:
        place = told.index(END, told.index(ord("T") - 32 + 6))
        assert told[place - 1] == 6  # the space
        del told[place - 1]
    assert told == expected + answer.tokens


def end_at_once(token: int) -> GenerationConfig:
    return GenerationConfig(sequence_bias={(token,): 1e4}, pad_token_id=0)


@each
@pytest.mark.parametrize("ended", [True, False], ids=["ended", "cut"])
def test_the_next_turn_is_the_templates(template: str, ended: bool, model: Any, read: Any) -> None:
    """All that a conversation made the model read is what the template makes of the conversation as a whole;
    where an answer was cut by its length, its end is read with the next turn."""
    tokenizer = letters(template)
    last = EOS if template == BRACKETS else END
    answer = modicum.generate(
        model, tokenizer, "One?", budget=400, max_new_tokens=5, generation_config=LETTERS_ALONE
    )
    text = answer.text.strip() if template == TRIMMED else answer.text
    history = [user("One?"), said(text)]
    if ended:
        more = modicum.generate(model, tokenizer, cache=answer.cache, generation_config=end_at_once(last))
        assert (more.tokens, more.finish_reason) == ([last], "stop")
    ways: list[dict[str, Any]] = [{"prompt": "Two?"}, {"prompt": [user("Two?")]}, {"question": "Two?"}]
    told = read()[0]
    for way in ways:
        after = modicum.generate(model, tokenizer, cache=answer.cache.copy(), max_new_tokens=1, **way)
        expected = written(tokenizer, [*history, user("Two?")])
        if template == BRACKETS and ended:  # it puts a space before the end, which the model has not written
            place = expected.index(EOS)
            assert expected[place - 1] == 6
            del expected[place - 1]
        if template == TRIMMED and text != answer.text:
            pytest.skip("the random answer ends in white space")
        assert told + read()[0] == expected + after.tokens


def test_rows_of_a_batch_are_each_as_alone(model: Any) -> None:
    tokenizer = letters(CHATML)
    rows: list[Any] = ["Who is the bear?", "Where?"]
    conversations = [CONVERSATIONS[2], CONVERSATIONS[3]]
    for batch in (rows, conversations):
        for question in (None, "And why?"):
            answers = modicum.generate(model, tokenizer, batch, question=question, **TIGHT)
            more = modicum.generate(model, tokenizer, rows, cache=answers[0].cache, max_new_tokens=4)
            for index, row in enumerate(batch):
                alone = modicum.generate(model, tokenizer, row, question=question, **TIGHT)
                assert (answers[index].tokens, answers[index].seen) == (alone.tokens, alone.seen)
                after = modicum.generate(model, tokenizer, rows[index], cache=alone.cache, max_new_tokens=4)
                assert (more[index].tokens, more[index].seen) == (after.tokens, after.seen)


def test_text_is_read_as_it_is_where_no_template_is_wanted(model: Any, read: Any) -> None:
    raw = [BOS, *letters(None)("Who?", add_special_tokens=False)["input_ids"]]
    for tokenizer, settings, expected in (
        (letters(None), {}, raw),
        (letters(CHATML), {"chat": False}, raw),
        (letters(CHATML), {"add_special_tokens": False}, raw[1:]),
        (letters(CHATML), {"add_special_tokens": True}, raw),
    ):
        answer = modicum.generate(model, tokenizer, "Who?", **settings, **MODEL_SETTINGS)
        assert read()[0] == expected + answer.tokens
    # A cache that has read such text goes on so.
    modicum.generate(model, letters(CHATML), " Why?", cache=answer.cache, max_new_tokens=1)
    assert read()[0][:5] == letters(None)(" Why?", add_special_tokens=False)["input_ids"]


def test_answers_end_at_the_templates_end_of_turn(model: Any) -> None:
    """The model's own end token is another one, as in many converted checkpoints."""
    tokenizer = letters(CHATML)
    config = end_at_once(END)
    settings: dict[str, Any] = {"budget": 400, "max_new_tokens": 4}
    chat = modicum.generate(model, tokenizer, "Who?", generation_config=config, **settings)
    assert (chat.tokens, chat.finish_reason) == ([END], "stop")
    raw = modicum.generate(model, tokenizer, "Who?", chat=False, generation_config=config, **settings)
    assert (raw.tokens, raw.finish_reason) == ([END] * 4, "length")
    config.eos_token_id = EOS  # what is asked for in words stays
    own = modicum.generate(model, tokenizer, "Who?", generation_config=config, **settings)
    assert own.finish_reason == "length"
    own = modicum.generate(
        model, tokenizer, "Who?", generation_config=end_at_once(EOS), **settings
    )  # and the model's end still counts
    assert (own.tokens, own.finish_reason) == ([EOS], "stop")


BAD: list[tuple[str | None, Any, dict[str, Any], str]] = [
    (None, [user("Who?")], {}, "no chat template"),
    (None, "Who?", {"chat": True}, "no chat template"),
    (CHATML, [user("Who?")], {"chat": False}, "messages came with chat=False"),
    (CHATML, "Who?", {"chat": "yes"}, "chat is 'yes'"),
    (CHATML, "Who?", {"chat": True, "add_special_tokens": True}, "which writes its own"),
    (CHATML, [user("Who?"), said("I.")], {}, "role 'assistant'"),
    (CHATML, [user("Who?"), {"role": "tool", "content": "5"}], {"question": "So?"}, "role 'tool'"),
    (CHATML, [user("")], {}, "last message of the prompt is empty"),
    (CHATML, [{"role": "user", "content": [{"type": "text", "text": "a"}]}], {}, "is list, not text"),
    (CHATML, [{"content": "Who?"}], {}, "give a dict with 'role' and 'content'"),
    (CHATML, [user("Who?"), "text"], {}, "message 1 of the prompt is 'text'"),
    (CHATML, [["text"]], {}, "message 0 of the prompt 0"),
    (CHATML, [[]], {}, "prompt 0 has no messages"),
    (BRACKETS, [user("a"), user("b")], {}, "refuses the messages: .*alternate"),
    (SHOUTED, "Who?", {}, r"as it changes its text: .*--raw"),
    (TAMED, "Who is the bear?", {}, r"as it changes its text: .*chat=False"),
    (TWICE, "Who?", {}, r"shows the last message 2 times.*--raw"),
]


@pytest.mark.parametrize(("template", "prompt", "settings", "message"), BAD, ids=[bad[3] for bad in BAD])
def test_what_cannot_be_written_as_turns_is_refused(
    template: str | None, prompt: Any, settings: dict[str, Any], message: str, model: Any
) -> None:
    with pytest.raises(InputError, match=message):
        modicum.generate(model, letters(template), prompt, **settings)


def test_a_cache_that_cannot_take_a_turn_is_refused(model: Any) -> None:
    tokenizer = letters(CHATML)
    raw = modicum.prefill(model, tokenizer, "Some text", budget=400, chat=False)
    for prompt, settings in (([user("Who?")], {}), ("Who?", {"chat": True})):
        with pytest.raises(InputError, match="read text without the chat template"):
            modicum.generate(model, tokenizer, prompt, cache=raw, **settings)
    started = modicum.prefill(model, tokenizer, "Some text", budget=400)
    with pytest.raises(InputError, match="in the user's turn, and messages came"):
        modicum.generate(model, tokenizer, [user("Who?")], cache=started)
    modicum.generate(model, tokenizer, "Who?", cache=started.copy(), max_new_tokens=1)
    with torch.no_grad():  # fed by hand, so where the turn is is not known any more
        model(torch.tensor([[50, 51]]), **cache_kwargs(model.forward, started))
    with pytest.raises(InputError, match="read text without the chat template"):
        modicum.generate(model, tokenizer, [user("Who?")], cache=started)


def test_tool_results_may_be_the_last_message(model: Any, read: Any) -> None:
    tokenizer = letters(CHATML)
    messages = [user("2 + 3?"), said("add(2, 3)"), {"role": "tool", "content": "5"}]
    answer = modicum.generate(model, tokenizer, messages, **MODEL_SETTINGS)
    assert read()[0] == written(tokenizer, messages) + answer.tokens


def test_a_text_may_say_what_a_template_says(model: Any, read: Any) -> None:
    tokenizer = letters(CHATML)
    text = "placeholder0of0text <|end|>\n<|begin|>assistant\n placeholder0of0answer"
    answer = modicum.generate(model, tokenizer, text, **MODEL_SETTINGS)
    assert read()[0] == written(tokenizer, [user(text)]) + answer.tokens


def test_a_raw_evaluation_reads_samples_as_they_are() -> None:
    """As base models do, with whose results they may be compared."""
    tokenizer = letters(CHATML)
    sample = Sample(
        task="t",
        index=0,
        context="A bear.",
        question="Who?",
        answers=["bear"],
        metric="contains",
        max_new_tokens=5,
    )
    prompt = Prompt.of(sample, zoo.shared("llama"), tokenizer, raw=True)
    assert prompt.context == tokenizer("A bear.")["input_ids"]
    assert prompt.question == tokenizer("Who?", add_special_tokens=False)["input_ids"]


def test_the_command_line_has_the_template_on_and_raw_off(model: Any, tmp_path: Path) -> None:
    tokenizer = letters(CHATML)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text("The bear.\n")
    common = ["run", "--model", str(tmp_path / "model"), "--budget", "400", "-n", "4", "--device", "cpu"]
    for more, chat in (([], None), (["--raw"], False)):
        arguments = [*common, "-f", str(tmp_path / "text"), "Who?", "--json", "--beside-full", *more]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        told = json.loads(result.stdout)
        expected = modicum.generate(
            model, tokenizer, "The bear.\n", question="Who?", budget=400, max_new_tokens=4, chat=chat
        )
        for one in (told, *told["full"]):
            assert (one["prompt_tokens"], one["tokens"]) == (expected.prompt_tokens, expected.tokens)


def test_a_task_begins_the_answer_itself_only_where_there_is_no_turn_for_it() -> None:
    for template, raw, begins in ((None, False, True), (CHATML, False, False), (CHATML, True, True)):
        _, question, answers = _task_sample("niah_single_1:max_new_tokens=8", 1500, letters(template), raw)
        assert question.endswith(" is") == begins
        assert len(answers) == 1
