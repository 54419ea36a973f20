"""modicum.load of GGUF files: which file is meant, and what is wrong with one that cannot be read."""

from __future__ import annotations

import importlib.util
import shutil
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import modicum
from modicum import gguf_file
from modicum.errors import ModelError
from tests import gguf_models

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def model() -> Any:
    return gguf_models.build("llama", len(gguf_models.tokens("gpt2")))


@pytest.fixture(scope="module")
def whole(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "tiny.gguf"
    gguf_models.write(path, model, "llama")
    return path


@pytest.fixture
def file(whole: Path, tmp_path: Path) -> Path:
    """A copy, alone in a folder, to be broken."""
    return Path(shutil.copy(whole, tmp_path / "tiny.gguf"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(torch.arange(3, 40)[None]).logits
    return out


def test_a_file_or_its_folder(model: Any, file: Path) -> None:
    for name in (file, str(file), file.parent):
        assert torch.equal(logits(modicum.load(name, device="cpu")[0]), logits(model))


def test_a_dtype(file: Path) -> None:
    loaded, _ = modicum.load(file, dtype="bfloat16", device="cpu")
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.skipif(
    importlib.util.find_spec("transformers.integrations.gguf") is None,
    reason="this release of transformers reads the tokenizers of GGUF files incompletely",
)
def test_the_tokenizer_is_the_files(file: Path) -> None:
    """Byte-level BPE by hand: control tokens whole, merges in their order, no token in front."""
    _, tokenizer = modicum.load(file, device="cpu")
    vocabulary = gguf_models.tokens("gpt2")
    pieces = ["<s>", "hello", "Ġw", "o", "r", "l", "d", "</s>", "Ċ", "Ã", "©"]
    text = "<s>hello world</s>\né"
    assert tokenizer(text)["input_ids"] == [vocabulary.index(piece) for piece in pieces]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.padding_side == "left"


def test_it_runs_under_a_budget_and_can_be_saved(model: Any, file: Path, tmp_path: Path) -> None:
    loaded, tokenizer = modicum.load(file, device="cpu")
    answer = modicum.generate(loaded, tokenizer, "hello " * 60, budget=64, chunk=16, max_new_tokens=5)
    assert answer.cache.nbytes <= answer.cache.budget_nbytes
    loaded.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, _ = modicum.load(tmp_path / "saved", device="cpu")
    assert torch.equal(logits(again), logits(model))


def test_safetensors_go_before_a_gguf_file_beside_them(model: Any, file: Path) -> None:
    other = gguf_models.build("llama", model.config.vocab_size, seed=1)
    other.save_pretrained(file.parent)
    modicum.load(file, device="cpu")[1].save_pretrained(file.parent)
    assert torch.equal(logits(modicum.load(file.parent, device="cpu")[0]), logits(other))
    assert torch.equal(logits(modicum.load(file, device="cpu")[0]), logits(model))
    (file.parent / "model.safetensors").unlink()  # as in folders that hold GGUF files and the original config
    assert torch.equal(logits(modicum.load(file.parent, device="cpu")[0]), logits(model))


def test_of_several_one_must_be_named(file: Path) -> None:
    shutil.copy(file, file.with_name("second.gguf"))
    with pytest.raises(
        ModelError, match=r"holds 2 GGUF files; give the path of one, such as '.*second\.gguf'"
    ):
        modicum.load(file.parent)


@pytest.mark.parametrize("missing", [("gguf",), ("accelerate",), ("gguf", "accelerate")])
def test_missing_packages_are_named(
    missing: tuple[str, ...], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> Any:
        return None if name in missing else importlib.util.find_spec(name)

    monkeypatch.setattr(gguf_file, "find_spec", find)
    with pytest.raises(ModelError, match=rf"package {' and .*'.join(missing)}; .*'modicum\[gguf\]'"):
        modicum.load(file)


def test_a_file_cut_at_any_byte(file: Path) -> None:
    """Inside the header every length is tried near its ends, and some in between; then inside the data."""
    data = file.read_bytes()
    cuts = {*range(4, 80), *range(80, len(data), len(data) // 80), *range(len(data) - 40, len(data))}
    for length in sorted(cuts):
        file.write_bytes(data[:length])
        with pytest.raises(
            ModelError, match=r"tiny\.gguf' is truncated or corrupted: .*; download or convert"
        ):
            gguf_file.GgufFile.open(file)
    with pytest.raises(ModelError, match=r"is truncated or corrupted: it has .* bytes, its header calls for"):
        modicum.load(file)


@pytest.mark.parametrize("length", [0, 3])
def test_a_file_shorter_than_its_first_word(length: int, file: Path) -> None:
    file.write_bytes(b"GGUF"[:length])
    with pytest.raises(ModelError, match="truncated"):
        modicum.load(file)


def test_flipped_bytes_never_end_in_another_error(file: Path) -> None:
    """What a damaged header can say is anything; the answer is words, or a header that may be read."""
    data = file.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        broken = bytearray(data)
        place = int(torch.randint(4, 6000, (), generator=generator))
        broken[place] = int(torch.randint(256, (), generator=generator))
        file.write_bytes(broken)
        with suppress(ModelError):
            gguf_file.GgufFile.open(file)


def edited(path: Path, at: int, form: str, value: Any) -> None:
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, at, value)
    path.write_bytes(data)


def test_other_files_and_versions(file: Path) -> None:
    edited(file, 4, "<I", 1)
    with pytest.raises(ModelError, match="GGUF version 1; versions 2 and 3"):
        modicum.load(file)
    file.write_bytes(b"GIF89a")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        modicum.load(file)


def test_a_part_of_a_split_model(file: Path) -> None:
    part = file.rename(file.with_name("tiny-00001-of-00002.gguf"))
    with pytest.raises(ModelError, match=r"one part of a split model.*llama-gguf-split --merge"):
        modicum.load(part)


@pytest.mark.parametrize("architecture", ["mpt", "no-such"])
def test_an_architecture_that_transformers_does_not_read(architecture: str, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_token_list(["a"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ModelError, match=f"architecture '{architecture}': .*not supported.*; give the model as"
    ):
        modicum.load(path)


def test_a_file_without_a_tensor_is_refused(whole: Path, tmp_path: Path) -> None:
    """transformers would fill in random numbers, and only warn."""
    path = tmp_path / "lacking.gguf"
    reader = gguf.GGUFReader(whole)
    fewer = gguf_models.build("llama", len(gguf_models.tokens("gpt2")))
    config: Any = fewer.config
    config.num_hidden_layers = 3  # the header says three, the weights are of two
    gguf_models.write(path, fewer, "llama")
    assert len(gguf.GGUFReader(path).tensors) == len(reader.tensors)
    with pytest.raises(ModelError, match=r"lack 9 tensors .* such as 'model\.layers\.2\."):
        modicum.load(path)
