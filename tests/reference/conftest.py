"""What the recipe's tests share: a book, a small tokenizer, folders of texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

import modicum
from modicum.reference.corpus import sentences, unwrap
from modicum.reference.documents import Writer
from modicum.reference.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def book() -> str:
    return modicum.sample_text()


@pytest.fixture(scope="module")
def tokenizer(book: str) -> Tokenizer:
    return train_tokenizer([book], 512)


@pytest.fixture(scope="module")
def writer(book: str, tokenizer: Tokenizer) -> Writer:
    cut = sentences(unwrap(book))
    return Writer(tokenizer, [[e.ids for e in tokenizer.encode_batch(cut, add_special_tokens=False)]])


@pytest.fixture
def data(tmp_path: Path, book: str) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "learnt.txt").write_text(book[:40_000], encoding="utf-8")
    (folder / "held-back.txt").write_text(book[40_000:60_000], encoding="utf-8")
    return folder
