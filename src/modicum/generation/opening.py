"""Opening: from what a caller gives (texts, a cache or its settings) to a reader and blocks of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from modicum.errors import CacheError, InputError
from modicum.generation.inputs import Block, check_text, check_texts, encode
from modicum.generation.limits import check_padding, check_positions
from modicum.generation.reader import Reader
from modicum.kv.cache import BudgetCache

Texts = str | Sequence[str] | None


@dataclass(frozen=True)
class Opening:
    """A reader, the block that it is to take in first, and how questions follow."""

    reader: Reader
    tokenizer: Any
    prompt: Block | None
    alone: bool
    """Whether one text was given, not a list: then one answer is returned, not a list."""
    special: bool | None
    """Whether texts get special tokens; None: only at the start of a cache."""

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: Any,
        prompt: Texts,
        cache: BudgetCache | None,
        build: Callable[[], BudgetCache],
        config: GenerationConfig | None = None,
        special: bool | None = None,
    ) -> Opening:
        """Check and encode the prompt; build the cache unless one is given.

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
        texts = None
        if prompt is not None:
            texts = (
                [check_text(prompt, "prompt")]
                if isinstance(prompt, str | bytes)
                else check_texts(prompt, "prompt")
            )
        elif cache is None:
            raise InputError("there is no prompt: give one, or a cache that has read one")
        cache = build() if cache is None else cache
        rows = len(texts) if texts is not None else max(1, cache.batch_size)
        reader = Reader(model, cache, rows, _pad(model, tokenizer, config))
        alone = isinstance(prompt, str) or (prompt is None and rows == 1)
        opening = cls(reader, tokenizer, None, alone, special)
        return (
            opening
            if texts is None
            else cls(reader, tokenizer, opening._block(texts, "prompt"), alone, special)
        )

    def question(self, text: str) -> Block:
        """The question, after whatever each row has read."""
        check_text(text, "question")
        return self._block([text] * self.reader.rows, "question", first=self.prompt is None)

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
        embeddings: Any = self.reader.model.get_input_embeddings()
        size = int(embeddings.weight.shape[0])
        return Block.of(
            encode(self.tokenizer, texts, what, special=special, vocabulary=size), self.reader.pad
        )


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
