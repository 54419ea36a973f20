"""A saved cache is refused once weights have changed, and loads for the same weights wherever they are."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

import modicum
from modicum import BudgetCache, SnapshotError
from modicum.kv.fingerprint import difference, embedding_checksum, weight_checksums
from modicum.kv.snapshot import _checksum
from modicum.weights.packed import PackedLinear, pack
from tests import zoo
from tests.driver import feed

SMALL = {"chunk": 16, "n_sink": 2, "recent": 4}
DEEP = 5


def deep() -> Any:
    """A model of five layers, of which the first, the middle and the last are looked at."""
    config = copy.deepcopy(zoo.shared("llama").config)
    config.num_hidden_layers, config.layer_types = DEEP, None
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation("sdpa")
    return model


def saved(model: Any, folder: Path) -> Path:
    cache = BudgetCache(model, "keydiff", 20, **SMALL)
    feed(model, cache, zoo.tokens(1, 40))
    cache.save(folder / "cache.safetensors")
    return folder / "cache.safetensors"


MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")


@pytest.mark.parametrize("layer", [0, DEEP // 2, DEEP - 1])
@pytest.mark.parametrize("name", MATRICES)
def test_a_changed_matrix_is_named(layer: int, name: str, tmp_path: Path) -> None:
    model = deep()
    path = saved(model, tmp_path)
    BudgetCache.load(path, model)
    with torch.no_grad():  # what merging an adapter of rank 1 does
        weight = model.model.layers[layer].get_submodule(name).weight
        weight += torch.outer(torch.ones(weight.shape[0]), torch.full((weight.shape[1],), 1e-3))
    message = rf"other weights: {name}\.weight of decoder layer {layer} differs"
    with pytest.raises(SnapshotError, match=message):
        BudgetCache.load(path, model)


def test_a_pruned_model_is_refused(tmp_path: Path) -> None:
    model, tokenizer = modicum.load("reference")
    cache = modicum.prefill(model, tokenizer, "The number for red is 7. " * 9, budget=64)
    cache.save(tmp_path / "cache.safetensors")
    BudgetCache.load(tmp_path / "cache.safetensors", model)
    modicum.prune(model, zoo.tokens(2, 32), sparsity=0.3, method="magnitude", refine=None)
    with pytest.raises(SnapshotError, match="other weights"):
        BudgetCache.load(tmp_path / "cache.safetensors", model)


def test_a_merged_adapter_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = deep()
    path = saved(model, tmp_path)
    modicum.detach(model)
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    merged = peft.get_peft_model(model, adapter).merge_and_unload()
    with pytest.raises(SnapshotError, match=r"other weights: self_attn\.q_proj\.weight of decoder layer 0"):
        BudgetCache.load(path, merged)


def test_the_same_weights_have_the_same_checksums() -> None:
    first, second = deep(), deep()
    assert weight_checksums(first) == weight_checksums(second)
    assert len(weight_checksums(first)) == 3 * 7
    # In 16 bits as in 32, if the numbers are the same.
    half = deep().to(torch.bfloat16)
    assert weight_checksums(half) == weight_checksums(deep().to(torch.bfloat16).float())
    assert difference(weight_checksums(half), weight_checksums(first)) is not None


@pytest.mark.parametrize("name", zoo.ALL)
def test_every_family_has_checksums_of_its_attention(name: str) -> None:
    found = weight_checksums(zoo.build(name))
    attention = [key for key in found if "attn" in key or "attention" in key]
    assert len({key.split(".")[0] for key in attention}) >= 2
    assert all(isinstance(value, int) for value in found.values())


def test_a_packed_layer_is_the_same_as_unpacked() -> None:
    model = deep()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data[torch.rand(module.weight.shape) < 0.5] = 0
    whole = weight_checksums(model)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    mask = child.weight != 0
                    packed = PackedLinear(pack(mask), child.weight.detach()[mask], child.in_features, None)
                    setattr(parent, name, packed)
    assert weight_checksums(model) == whole


def test_offloaded_weights_are_read_where_they_are() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = deep()
    whole, embeddings = weight_checksums(model), embedding_checksum(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert next(model.parameters()).is_meta
    assert weight_checksums(model) == whole
    assert embedding_checksum(model) == embeddings


def test_weights_on_disk_are_not_compared(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = deep()
    whole = weight_checksums(model)
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    found = weight_checksums(model)
    assert set(found.values()) == {None}
    assert embedding_checksum(model) == 0
    assert difference(found, whole) is None


@pytest.mark.parametrize("number", [1, 2])
def test_earlier_formats_are_read_by_their_embeddings(number: int, tmp_path: Path) -> None:
    model = deep()
    path = saved(model, tmp_path)
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["modicum"])
    tensors = load_file(path)
    for key in ("weights", "checksum") + (("positions", "store") if number == 1 else ()):
        del header[key]
    header["format"] = number
    header["checksum"] = _checksum(header, tensors)
    save_file(tensors, path, metadata={"modicum": json.dumps(header)})
    assert BudgetCache.load(path, model).seen == 40
    model.model.embed_tokens.weight.data[:8] += 1
    with pytest.raises(SnapshotError, match="its embeddings differ"):
        BudgetCache.load(path, model)
