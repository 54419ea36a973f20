"""Chat: prompts and questions written as turns of a conversation, by the tokenizer's chat template.

A turn is cut where a cache is compressed: what comes before the text and the text itself are read first; a
question, the end of the turn and the header of the answer come after. To find the cuts, the template is
rendered with a placeholder for the text, as kvpress does (kvpress/pipeline.py); then the parts are compared
with the template's own rendering of the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from modicum.errors import InputError
from modicum.generation.inputs import check_text
from modicum.generation.turn import Turn
from modicum.kv.cache import BudgetCache

Message = Mapping[str, Any]
"""A dict with "role" and "content", as `apply_chat_template` takes it."""
Row = str | list[Message]
"""What one row of a batch reads: a text, or the messages of a conversation."""

_TEXT, _ANSWER = "placeholder0of0text", "placeholder0of0answer"
_JOINT = "\n\n"
"""Between a text and a question that follows it in the same turn, if there is no white space already."""


@dataclass(frozen=True)
class Part:
    """Text to be read, and the first token of it that has been read already, if any."""

    text: str
    read: int | None = None


@dataclass(frozen=True)
class _Frame:
    """What the template puts around the text of a turn."""

    head: str
    tail: str
    keeps_left: bool
    """Whether white space before the text stays."""
    keeps_right: bool

    def text(self, content: str, *, left: bool = True, right: bool = True) -> str:
        """The content as the template shows it; `left`, `right`: whether it begins and ends there."""
        content = content.lstrip() if left and not self.keeps_left else content
        return content.rstrip() if right and not self.keeps_right else content


class Chat:
    """The template of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def prompt(self, rows: Sequence[Row], turn: Turn | None, *, closing: bool) -> tuple[list[Part], Turn]:
        """What each row reads, and the turn that it is in afterwards.

        Args:
            turn: where the cache's conversation is; None for a new one.
            closing: the answer follows, not a question.

        Raises:
            InputError: messages that the template refuses, changes, or that do not end with the user's.
        """
        parts, tails, spaced = [], [], []
        for index, row in enumerate(rows):
            if turn is not None and turn.is_open:
                if not isinstance(row, str):
                    raise InputError(
                        "the cache is in the user's turn, and messages came: give text, or a question, to go "
                        "on with that turn"
                    )
                frame = _Frame("", turn.tails[index], True, self._plain.keeps_right)
                part, text = Part(frame.text(row, right=closing)), row
            else:
                part, frame, text = self._first(row, turn, index, closing)
            parts.append(Part(part.text + (frame.tail if closing else ""), part.read))
            tails.append(frame.tail)
            spaced.append(text == "" or text[-1].isspace())
        return parts, Turn() if closing else Turn(tails, spaced)

    def question(self, text: str, turn: Turn | None, rows: int) -> tuple[list[Part], Turn]:
        """What each row reads of a question: in the turn that is open, or as a turn of its own."""
        if turn is None or not turn.is_open:
            return self.prompt([text] * rows, turn, closing=True)
        joints = ["" if spaced or text[:1].isspace() else _JOINT for spaced in turn.spaced]
        shown = self._plain.text(text, left=False)
        parts = [Part(joint + shown + tail) for joint, tail in zip(joints, turn.tails, strict=True)]
        return parts, Turn()

    def end(self, turn: Turn) -> tuple[list[Part], Turn]:
        """What each row reads where the answer follows with no more text."""
        return [Part(tail) for tail in turn.tails], Turn()

    @cached_property
    def stop_token(self) -> int | None:
        """The token that ends an answer, if the template ends it with a special one."""
        asked: list[Message] = [{"role": "user", "content": _TEXT}, {"role": "assistant", "content": _ANSWER}]
        try:
            after = self._render(asked, answer=False).partition(_ANSWER)[2].lstrip()
        except InputError:
            return None
        ids = self.tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
        return ids[0] if ids and self._is_special(ids[0]) else None

    def _first(self, row: Row, turn: Turn | None, index: int, closing: bool) -> tuple[Part, _Frame, str]:
        """The beginning of a turn: its text behind its head, its frame, and the text as it was given."""
        messages: list[Message] = [{"role": "user", "content": row}] if isinstance(row, str) else list(row)
        before: list[Message] = []
        if turn is not None:
            before = [{"role": "user", "content": _TEXT}, {"role": "assistant", "content": _ANSWER}]
        role, text = messages[-1]["role"], messages[-1].get("content")
        if role == "user" and isinstance(text, str):
            frame = self._frame(before, messages)
            whole = self._cut(self._render([*before, *messages]), before)
            if whole != frame.head + frame.text(text) + frame.tail:
                raise _unsplittable("changes its text")
        elif role == "assistant" or not closing:
            raise InputError(
                f"the last message is of the role {role!r}: the last must be the user's, with text as "
                "content, as the answer (and a question) follows it"
            )
        else:
            frame, text = _Frame(self._cut(self._render([*before, *messages]), before), "", True, True), ""
        shown = frame.text(text, right=closing)
        if turn is None:
            return Part(frame.head + shown), frame, text
        # The token that ended the answer before is in the cache already.
        last = turn.last[index]
        blank, token, rest = frame.head.partition(str(self.tokenizer.convert_ids_to_tokens(last)))
        if token and not blank.strip() and self._is_special(last):
            return Part(token + rest + shown, last), frame, text
        return Part(frame.head + shown), frame, text

    @cached_property
    def _plain(self) -> _Frame:
        """Around a user's first message."""
        return self._frame([], [{"role": "user", "content": ""}])

    def _frame(self, before: list[Message], messages: list[Message]) -> _Frame:
        """Around the last of the messages, which is the user's."""
        word = _TEXT
        while any(word in str(message.get("content")) for message in messages):
            word += "0"

        def shown(content: str) -> str:
            return self._cut(
                self._render([*before, *messages[:-1], {**messages[-1], "content": content}]), before
            )

        whole = shown(word)
        if whole.count(word) != 1:
            raise _unsplittable(
                f"shows the last message {whole.count(word)} times" if word in whole else "changes its text"
            )
        head, _, tail = whole.partition(word)
        wide = shown(f" \n{word}\n ")
        return _Frame(head, tail, f" \n{word}" in wide, f"{word}\n " in wide)

    def _render(self, messages: list[Message], *, answer: bool = True) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=answer
            )
        except Exception as error:  # a template may raise anything, and most do so in words
            raise InputError(f"the chat template refuses the messages: {error}") from error
        return text

    def _cut(self, text: str, before: list[Message]) -> str:
        """The text behind the earlier answer, if there was one."""
        if not before:
            return text
        _, found, rest = text.partition(_ANSWER)
        if not found:
            raise InputError(
                "the chat template leaves out earlier answers, so the conversation in the cache cannot go on "
                "as it says: begin anew with all messages"
            )
        return rest

    def _is_special(self, token: int) -> bool:
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return token in self.tokenizer.all_special_ids or (token in added and added[token].special)


def _unsplittable(what: str) -> InputError:
    return InputError(
        f"the chat template cannot be split around the user's message, as it {what}: give chat=False (--raw) "
        "and write the turns yourself"
    )


def check_rows(prompt: object) -> tuple[list[Row], bool]:
    """The rows of a prompt, and whether it is one text or conversation, not a list of them.

    Raises:
        InputError: it is neither text, messages, nor a list of these.
    """
    if isinstance(prompt, str | bytes):
        return [check_text(prompt, "prompt")], True
    if not isinstance(prompt, list | tuple):
        raise InputError(
            f"the prompt is {type(prompt).__name__}: give a str, a list of messages, or a list of either"
        )
    if not prompt:
        raise InputError("the list of prompts is empty: give at least one")
    if isinstance(prompt[0], Mapping):
        return [_check_messages(prompt, "prompt")], True
    rows: list[Row] = []
    for index, row in enumerate(prompt):
        is_list = isinstance(row, list | tuple)
        rows.append(
            _check_messages(row, f"prompt {index}") if is_list else check_text(row, f"prompt {index}")
        )
    return rows, False


def _check_messages(messages: Sequence[Any], what: str) -> list[Message]:
    if not messages:
        raise InputError(f"the {what} has no messages: give at least one")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(
                f"message {index} of the {what} is {message!r:.80}: give a dict with 'role' and 'content'"
            )
        if "content" not in message and "tool_calls" not in message:
            raise InputError(f"message {index} of the {what} has no 'content': give its text")
    last = messages[-1]
    if last["role"] == "user":
        check_text(last.get("content"), f"last message of the {what}")
    return list(messages)


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template."""
    return getattr(tokenizer, "chat_template", None) is not None


def wanted(
    tokenizer: Any, chat: bool | None, rows: Sequence[Row], cache: BudgetCache | None, special: bool | None
) -> bool:
    """Whether texts are to be written as turns.

    Raises:
        InputError: that was asked for, in words or by messages, and cannot be done.
    """
    if chat not in (None, True, False):
        raise InputError(
            f"chat is {chat!r}: give True, False, or None for what the tokenizer has a template for"
        )
    is_templated = has_template(tokenizer)
    has_messages = any(not isinstance(row, str) for row in rows)
    is_foreign = cache is not None and cache.seen > 0 and Turn.of(cache) is None
    if has_messages and chat is False:
        raise InputError("messages came with chat=False: give text, or leave chat to None")
    if not (chat or has_messages):
        return chat is None and is_templated and special is None and not is_foreign
    if not is_templated:
        what = "messages came" if has_messages else "chat=True was given"
        raise InputError(f"{what}, and the tokenizer has no chat template: give text as the model expects it")
    if special is not None:
        raise InputError(
            "add_special_tokens goes with text without a chat template, which writes its own: leave it out, "
            "or give chat=False"
        )
    if is_foreign:
        raise InputError(
            "the cache has read text without the chat template, so no turn can follow: give text and "
            "chat=False, or a new cache"
        )
    return True
