"""A pruned model in a folder, as an ordinary checkpoint that other software loads or as a packed file: all of
it or nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

import modicum
from modicum.errors import InputError, ModelError
from modicum.report.pruned import read_pruned
from modicum.weights import packed, save
from modicum.weights.prune import PruneReport
from tests.weights.models import FAMILIES, build, ids

FORMATS = ("packed", "dense")

# What a user of plain transformers runs: nothing of modicum is imported, and it cannot be.
PLAIN = """
import sys
sys.modules["modicum"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model, loading = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(loading.values()), loading
with torch.no_grad():
    logits = model(torch.tensor(eval(sys.argv[2]))).logits
save_file({"logits": logits, **{k: v.clone() for k, v in model.state_dict().items()}}, sys.argv[3])
"""


def loaded_elsewhere(folder: Path, tokens: Tensor, out: Path) -> dict[str, Tensor]:
    """The state dict, and the logits, of a folder in a process that has transformers alone."""
    path = out / "seen.safetensors"
    command = [sys.executable, "-c", PLAIN, str(folder), repr(tokens.tolist()), str(path)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": ""})
    return load_file(path)


def pruned(family: str = "llama", **settings: Any) -> tuple[PruneReport, PreTrainedModel]:
    model = build(family)
    return modicum.prune(model, ids(), **{"sparsity": 0.5, "refine": None, **settings}), model


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_plain_transformers_loads_a_dense_checkpoint(family: str, tmp_path: Path) -> None:
    report, model = pruned(family)
    modicum.BudgetCache(model, budget=64, chunk=8, recent=4)  # switches the model to our attention
    size = save(report, model, None, tmp_path / "out", format="dense")
    config = (tmp_path / "out/config.json").read_text(encoding="utf-8")
    assert "modicum" not in config
    assert json.loads(config)["architectures"] == [type(model).__name__]
    assert json.loads(config)["dtype"] == "float32"
    assert size == (tmp_path / "out/model.safetensors").stat().st_size
    seen = loaded_elsewhere(tmp_path / "out", ids(), tmp_path)
    with torch.no_grad():
        assert torch.equal(seen.pop("logits"), model(ids()).logits)
    assert seen.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(seen[name], value)
    for name, mask in report.masks.items():
        assert torch.equal(seen[name] == 0, ~mask)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dense_checkpoint_has_the_names_and_dtype_of_the_original(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Tensor names are those that other software reads: an expert is a tensor of its own in Mixtral's."""
    build(family).to(dtype).save_pretrained(tmp_path / "original")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    report = modicum.prune(model, ids(), sparsity=0.5, refine=None)
    save(report, model, None, tmp_path / "out", format="dense")
    names = [tensors_of(tmp_path / folder) for folder in ("original", "out")]
    assert names[0] == names[1]
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("original", "out")]
    assert configs[0] == configs[1]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == dtype
    assert torch.equal(again(ids()).logits, model(ids()).logits)


def tensors_of(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of each tensor of a checkpoint."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = part.get_dtype(), part.get_shape()
    return found


def test_tied_embeddings_are_written_once_and_stay_tied(tmp_path: Path) -> None:
    model = build("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    report = modicum.prune(model, ids(), sparsity=0.5)
    save(report, model, None, tmp_path / "out", format="dense")
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(ids()).logits, model(ids()).logits)


def test_a_model_that_was_packed_can_be_written_dense(tmp_path: Path) -> None:
    """And one of experts too, though it never was read from the original's tensor names."""
    report, model = pruned("mixtral")
    save(report, model, None, tmp_path / "packed")
    from modicum.weights.restore import restore

    again = restore(tmp_path / "packed", "auto")
    save(report, again, None, tmp_path / "dense", format="dense")
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in tensors_of(tmp_path / "dense")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(found(ids()).logits, model(ids()).logits)


def test_a_model_placed_by_accelerate_is_written_whole(tmp_path: Path) -> None:
    """A device map with "cpu" in it is what transformers takes for offloading."""
    pytest.importorskip("accelerate")
    build("llama").save_pretrained(tmp_path / "original")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original", device_map="cpu")
    report = modicum.prune(model, ids(), sparsity=0.5)
    save(report, model, None, tmp_path / "out", format="dense")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(found(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("format", FORMATS)
def test_a_generation_config_that_transformers_refuses_to_save_is_kept(format: str, tmp_path: Path) -> None:
    """As published checkpoints have: a temperature, and no sampling."""
    report, model = pruned()
    model.generation_config = GenerationConfig(do_sample=False, temperature=0.5, eos_token_id=3)
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "plain")
    save(report, model, None, tmp_path / "out", format=format)
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (found.temperature, found.do_sample, found.eos_token_id) == (0.5, False, 3)
    assert model.generation_config.temperature == 0.5


@pytest.mark.parametrize("format", FORMATS)
def test_tokenizer_and_report_stand_beside_the_weights(format: str, tmp_path: Path) -> None:
    _, tokenizer = modicum.load("reference")
    source = tmp_path / "source"
    tokenizer.save_pretrained(source)
    (source / "tokenizer.model").write_bytes(b"what a converter reads and transformers does not write")
    tokenizer = AutoTokenizer.from_pretrained(source)
    report, model = pruned(sparsity=0.6, refine="dsnot")
    size = save(report, model, tokenizer, tmp_path / "out", format=format, details={"perplexity_before": 9.5})
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("The quick brown fox.")["input_ids"] == tokenizer("The quick brown fox.")["input_ids"]
    assert (tmp_path / "out/tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    told = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert (told["format"], told["file_bytes"], told["perplexity_before"]) == (format, size, 9.5)
    assert told["achieved"] == report.achieved
    assert [row["kept"] for row in told["table"]] == [int(mask.sum()) for mask in report.masks.values()]
    (run,) = read_pruned([tmp_path / "out"])
    assert run.packed_bytes == (size if format == "packed" else None)
    mode = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert len(mode) == 1  # those of the weights as well: safetensors makes them the owner's alone


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("moment", ["weights", "tokenizer", "move"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("No space left on device")], ids=repr)
@pytest.mark.parametrize("state", [False, True], ids=["new", "resumed"])
def test_what_is_interrupted_leaves_nothing(
    format: str,
    moment: str,
    error: BaseException,
    state: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report, model = pruned()
    folder, tokenizer = tmp_path / "out", Broken(error if moment == "tokenizer" else None)
    if state:
        (folder / "state").mkdir(parents=True)
        (folder / "state/run.json").write_text("{}")
    if moment == "weights":
        monkeypatch.setattr(packed, "save_file", failing(error))
        monkeypatch.setattr(type(model.config), "save_pretrained", failing(error))
    if moment == "move":
        monkeypatch.setattr(Path, "replace", stopping(error, after=2))
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ModelError
    with pytest.raises(expected, match="No space left" if expected is ModelError else None):
        save(report, model, tokenizer, folder, format=format)
    monkeypatch.undo()
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else None
    assert left == (["state", "state/run.json"] if state else None)
    save(report, model, Broken(None), folder, format=format)
    assert (folder / "config.json").is_file()
    assert not list(folder.glob(".*"))


class Broken:
    """A tokenizer that writes a file and may fail."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")
        if self.error is not None:
            raise self.error


def failing(error: BaseException) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def stopping(error: BaseException, after: int) -> Any:
    real, calls = Path.replace, []

    def replace(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) > after:
            raise error
        return real(self, target)

    return replace


def test_the_configuration_is_moved_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it nothing loads a folder whose process was killed while files were moved."""
    report, model = pruned()
    real, moved = Path.replace, []
    monkeypatch.setattr(Path, "replace", lambda self, to: (moved.append(to.name), real(self, to))[1])
    save(report, model, None, tmp_path / "out", format="dense")
    assert moved[-1] == "config.json"
    assert "model.safetensors" in moved


@pytest.mark.parametrize("format", FORMATS)
def test_a_folder_with_something_in_it_is_left_alone(format: str, tmp_path: Path) -> None:
    report, model = pruned()
    save(report, model, None, tmp_path / "one", format=format)
    before = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    for again in FORMATS:
        with pytest.raises(InputError, match=r"is not empty, it holds .*: give another folder"):
            save(report, model, None, tmp_path / "one", format=again)
    assert {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()} == before
    (tmp_path / "file").write_text("text")
    with pytest.raises(InputError, match="is a file: give a folder"):
        save(report, model, None, tmp_path / "file", format=format)
    (tmp_path / "empty/.hidden").mkdir(parents=True)
    save(report, model, None, tmp_path / "empty", format=format)
    with pytest.raises(InputError, match="choose one of packed, dense"):
        save(report, model, None, tmp_path / "new", format="gguf")


@pytest.mark.parametrize("format", FORMATS)
def test_a_report_of_another_model_is_refused(format: str, tmp_path: Path) -> None:
    report, _ = pruned()
    for other, message in (
        (build("opt"), "q_proj.weight is missing"),
        (build("llama"), "not pruned as its mask says"),
    ):
        with pytest.raises(
            ModelError, match=f"not of this model .*{message}; give the model that was pruned"
        ):
            save(report, other, None, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()
