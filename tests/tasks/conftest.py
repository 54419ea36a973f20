"""Two tokenizers that have nothing in common."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import modicum
from tests.tiny_model import TINY_MODEL


@pytest.fixture(scope="session")
def tiny() -> Any:
    """SentencePiece-like, of transformers, with a token that opens a text."""
    return modicum.load(TINY_MODEL)[1]


@pytest.fixture(scope="session")
def byte_level() -> Any:
    """Byte-level BPE of the package `tokenizers` itself, with a token that opens a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = modicum.sample_text()
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


@pytest.fixture(scope="session", params=["tiny", "byte_level"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """Each of them."""
    return request.getfixturevalue(request.param)
