"""What modicum asks of transformers warns of nothing: no deprecated name, and nothing that is logged."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

import modicum
from modicum.cli import app, console
from modicum.compat import cache_kwargs
from tests import zoo
from tests.driver import feed
from tests.generation.test_models import Letters

SMALL = {"n_sink": 2, "recent": 4}


class ComplaintError(Exception):
    """transformers logged a warning."""


class _Raising(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise ComplaintError(record.getMessage())


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Deprecations and what transformers logs are errors, also what it logs once in a process."""
    monkeypatch.setattr(console, "quiet", lambda: None)
    logger, handler = logging.getLogger("transformers"), _Raising(logging.WARNING)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    # Each of these functions remembers what it said, and does not say it again.
    for said in (transformers_logging.warning_once, getattr(transformers_logging, "info_once", None)):
        if said is not None:
            said.cache_clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            warnings.simplefilter("error", DeprecationWarning)
            # torch.compile imports parts of torch that torch has deprecated.
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_the_fixture_makes_errors_of_warnings() -> None:
    for _ in range(2):
        transformers_logging.warning_once.cache_clear()
        with pytest.raises(ComplaintError, match="once"):
            transformers_logging.get_logger("transformers.models").warning_once("once")
    with pytest.raises(FutureWarning):
        warnings.warn("old", FutureWarning, stacklevel=1)


@pytest.mark.parametrize("name", zoo.ALL)
def test_calls_and_generate(name: str) -> None:
    model, ids = zoo.build(name), zoo.tokens(1, 30)
    cache = modicum.BudgetCache(model, "keydiff", 20, chunk=16, **SMALL)
    feed(model, cache, ids, cuts=(10, 29))
    for settings in ({"do_sample": False}, {"num_beams": 2, "do_sample": False}):
        cache = modicum.BudgetCache(model, "keydiff", 20, chunk=16, **SMALL)
        config = GenerationConfig(max_new_tokens=4, pad_token_id=0, **settings)
        out = model.generate(ids, **cache_kwargs(model.generate, cache), generation_config=config)
        assert out.shape == (1, 34)
    modicum.detach(model)


@pytest.mark.parametrize("name", zoo.ALL)
def test_answers(name: str) -> None:
    model, text = zoo.build(name), "the quick brown fox jumps over the lazy dog"
    settings = {"policy": "h2o", "budget": 24, "max_new_tokens": 4, **SMALL}
    answer = modicum.generate(model, Letters(), text, **settings)
    assert "".join(modicum.stream(model, Letters(), text, **settings)) == answer.text
    beams = GenerationConfig(max_new_tokens=4, num_beams=2, do_sample=False)
    modicum.generate(model, Letters(), [text, text[:20]], generation_config=beams, budget=24, **SMALL)
    modicum.detach(model)


@pytest.mark.inductor
def test_compiled_decode() -> None:
    settings = {"policy": "streamingllm", "budget": 16, "max_new_tokens": 3, "compile": True, **SMALL}
    answer = modicum.generate(zoo.build("llama"), Letters(), "the quick brown fox jumps over", **settings)
    assert len(answer.tokens) == 3


def test_commands(tmp_path: Path) -> None:
    results, pruned = tmp_path / "results", tmp_path / "pruned"
    text = "The special magic number for amber-otter mentioned in the provided text is: 1234567. " * 8
    for command, *more in (
        ("run -p auto -b 96 -n 3 --beside-full", text),
        ("heads --tokens 64 --copies 2 --seeds 1",),
        (f"keep -p snapkv -b 96 -o {tmp_path}/kept.png", text),
        (f"eval -p keydiff -t niah_single_1 -l 512 -n 1 -b 25% -o {results}",),
        (f"report {results} --trace keydiff@25%",),
        (f"prune --sequences 2 --length 32 -o {pruned}",),
        (f"report {pruned}",),
        (f"run -m {pruned} -b 96 -n 3", text),
    ):
        result = CliRunner().invoke(app, [*command.split(), *more])
        assert result.exception is None, (command, result.exception, result.output)
