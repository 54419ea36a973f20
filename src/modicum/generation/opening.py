"""Opening: from what a caller gives (texts, a cache or its settings) to a reader and blocks of tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from modicum.errors import CacheError, InputError
from modicum.generation.chat import Chat, Part, Row, check_rows, wanted
from modicum.generation.inputs import Block, check_text, encode
from modicum.generation.limits import check_padding, check_positions
from modicum.generation.reader import Reader
from modicum.generation.turn import Turn
from modicum.kv.cache import BudgetCache

Prompt = str | Sequence[Any] | None
"""Text, the messages of a conversation, or a list of either."""


@dataclass(frozen=True)
class Writing:
    """How texts become tokens."""

    special: bool | None = None
    """Whether texts get the tokenizer's special tokens; None: only at the start of a cache."""
    chat: bool | None = None
    """Whether texts are turns by the chat template; None: where the tokenizer has one."""


@dataclass(frozen=True)
class Opening:
    """A reader, the block that it is to take in first, and how questions follow."""

    reader: Reader
    tokenizer: Any
    prompt: Block | None
    alone: bool
    """Whether one text was given, not a list: then one answer is returned, not a list."""
    special: bool | None
    """Whether texts without a template get special tokens; None: only at the start of a cache."""
    chat: Chat | None
    """The template, if one is used."""

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: Any,
        prompt: Prompt,
        cache: BudgetCache | None,
        build: Callable[[int | None], BudgetCache],
        *,
        config: GenerationConfig | None = None,
        writing: Writing = Writing(),
        closing: bool = False,
    ) -> Opening:
        """Check and encode the prompt; build the cache unless one is given, for so many tokens of text.

        closing: the answer follows the prompt (or what the cache has read), not a question.

        Raises:
            InputError: texts that cannot be used, or that do not fit the cache.
            CacheError: the cache of another model.
        """
        if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
            raise InputError(
                f"the tokenizer is {type(tokenizer).__name__}: give the one that modicum.load returned"
            )
        if cache is not None and not isinstance(cache, BudgetCache):
            raise InputError(
                f"the cache is {type(cache).__name__}: give a modicum.BudgetCache, or none for a new one"
            )
        # Asked before the forward, where another model's attention may stumble over the cache first.
        if cache is not None and cache.shared.config is not model.config.get_text_config(decoder=True):
            raise CacheError(
                "the cache was built for another model: give the model it was made with, or no cache"
            )
        if prompt is None and cache is None:
            raise InputError("there is no prompt: give one, or a cache that has read one")
        texts, alone = ([], False) if prompt is None else check_rows(prompt)
        chat = Chat(tokenizer) if wanted(tokenizer, writing.chat, texts, cache, writing.special) else None
        cache = build(_num_tokens(tokenizer, texts)) if cache is None else cache
        rows = len(texts) or max(1, cache.batch_size)
        reader = Reader(model, cache, rows, _pad(model, tokenizer, config))
        opening = cls(reader, tokenizer, None, alone or (not texts and rows == 1), writing.special, chat)
        return replace(opening, prompt=opening._first(texts, closing))

    def _first(self, texts: list[Row], closing: bool) -> Block | None:
        """The block of the prompt."""
        turn = self.reader.turn
        if self.chat is None:
            # Messages have a template, or were refused.
            return self._block([str(text) for text in texts], "prompt") if texts else None
        if texts:
            return self._turn(*self.chat.prompt(texts, turn, closing=closing), "prompt")
        if closing and turn is not None and turn.is_open:
            return self._turn(*self.chat.end(turn), "end of the user's turn")
        return None

    def question(self, text: str) -> Block:
        """The question, after whatever each row has read."""
        check_text(text, "question")
        rows = self.reader.rows
        if self.chat is None:
            return self._block([text] * rows, "question", first=self.prompt is None)
        turn = self.reader.turn if self.prompt is None else self.prompt.turn
        return self._turn(*self.chat.question(text, turn, rows), "question")

    def warn(self, questions: Sequence[Block], new: int) -> None:
        """Warn of what will be worse than one might think, with `new` tokens after the longest question."""
        told = self.reader.transcript.valid
        if self.prompt is not None and told.shape[1]:
            given = self.prompt.valid
            joined = [told, torch.ones_like(self.prompt.ids).bool() if given is None else given]
            check_padding(self.reader.cache, torch.cat(joined, dim=1))
        last = max(self.reader.cache.row_seen, default=0) + new
        last += 0 if self.prompt is None else max(self.prompt.counts)
        last += max((max(block.counts) for block in questions), default=0)
        cache = self.reader.cache
        if cache.numbering == "renumbered":  # no rank goes beyond what is held and the chunk in hand
            last = min(last, cache.most_slots + cache.budget.chunk)
        check_positions(self.reader.model, last)

    def _block(self, texts: list[str], what: str, first: bool = True) -> Block:
        special = self.special
        if special is None:
            special = first and self.reader.cache.seen == 0
        return Block.of(self._encode(texts, what, special), self.reader.pad)

    def _turn(self, parts: list[Part], turn: Turn, what: str) -> Block:
        """A block of turns; the template has the special tokens in its text."""
        rows = self._encode([part.text for part in parts], what, special=False)
        rows = [ids[1:] if ids[0] == part.read else ids for ids, part in zip(rows, parts, strict=True)]
        return Block.of(rows, self.reader.pad, turn)

    def _encode(self, texts: list[str], what: str, special: bool) -> list[list[int]]:
        embeddings: Any = self.reader.model.get_input_embeddings()
        size = int(embeddings.weight.shape[0])
        return encode(self.tokenizer, texts, what, special=special, vocabulary=size)


def _num_tokens(tokenizer: Any, texts: Sequence[Row]) -> int:
    """Tokens of the longest prompt, its template and special tokens left out."""
    plain = [
        text if isinstance(text, str) else "\n".join(str(message.get("content") or "") for message in text)
        for text in texts
    ]
    # Only counted here: whether the model knows them is asked when they are to be read.
    return max(map(len, encode(tokenizer, plain, "prompt", special=False, vocabulary=sys.maxsize)))


def _pad(model: PreTrainedModel, tokenizer: Any, config: GenerationConfig | None) -> int:
    """A token to stand where there is none; any will do, as it is masked."""
    sources = (config, tokenizer, model.generation_config)
    for name in ("pad_token_id", "eos_token_id"):
        for source in sources:
            value = getattr(source, name, None)
            value = value[0] if isinstance(value, list | tuple) and value else value
            if isinstance(value, int):
                return value
    return 0
