"""Models in wrappers, with adapters or without their weights: pruned as the model inside, or refused with a
remedy that works.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import modicum
from modicum.errors import ModelError
from modicum.weights import save
from tests.bounds import assert_same_logits
from tests.weights.models import build, ids

accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

WRAPPERS: dict[str, Callable[[PreTrainedModel], nn.Module]] = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "data-parallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}


def refused(model: nn.Module) -> str:
    """The message with which pruning the model is refused; nothing of it is changed."""
    before = {name: value.clone() for name, value in model.state_dict().items() if not value.is_meta}
    with pytest.raises(ModelError) as caught:
        modicum.prune(model, ids(), sparsity=0.5)
    for name, value in model.state_dict().items():
        assert value.is_meta or torch.equal(value, before[name])
    return str(caught.value)


def lora(**settings: object) -> object:
    return peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, **settings)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_is_pruned_as_the_model_inside(
    wrap: Callable[[PreTrainedModel], nn.Module], tmp_path: Path
) -> None:
    plain, inner = build("llama"), build("llama")
    wrapped = wrap(inner)
    expected = modicum.prune(plain, ids(), sparsity=0.5)
    report = modicum.prune(wrapped, ids(), sparsity=0.5)
    assert list(report.masks) == list(expected.masks)
    for name, value in plain.state_dict().items():
        assert torch.equal(inner.state_dict()[name], value)
    save(report, wrapped, None, tmp_path / "out", format="dense")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(found(ids()).logits, plain(ids()).logits)


@pytest.mark.parametrize("whole", [True, False], ids=["model", "layers"])
def test_a_model_compiled_in_place_is_pruned_though_it_ran_before(whole: bool) -> None:
    """A compiled graph does not call hooks that were added after it was made."""
    plain, model = build("llama"), build("llama")
    for module in [model] if whole else model.model.layers:
        module.compile(backend="eager")
    with torch.no_grad():
        model(ids()[:1], use_cache=False)
    expected = modicum.prune(plain, ids(), sparsity=0.5, method="sparsegpt", refine=None)
    report = modicum.prune(model, ids(), sparsity=0.5, method="sparsegpt", refine=None)
    assert [row.tokens for row in report.table] == [row.tokens for row in expected.table]
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_offloaded_weights_must_be_loaded_whole(how: str, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    model, device = build("llama"), torch.device("cpu")
    if how == "cpu":
        accelerate.cpu_offload(model, execution_device=device)
    else:
        accelerate.disk_offload(model, tmp_path / "offload", execution_device=device)
    message = refused(model)
    assert "are offloaded" in message
    assert "must be loaded whole" in message
    assert "device_map=None" in message
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=None)
    assert modicum.prune(again, ids(), sparsity=0.5).achieved == 0.5


def test_weights_without_values_must_be_loaded_whole() -> None:
    with torch.device("meta"):
        empty = type(build("llama"))(build("llama").config)
    assert "must be loaded whole" in refused(empty)
    part = build("llama")
    part.model.layers[1].mlp.to("meta")
    message = refused(part)
    assert "3 of the model's" in message
    assert "model.layers.1.mlp.gate_proj.weight" in message
    report = modicum.prune(full := build("llama"), ids(), sparsity=0.5)
    full.model.norm.to("meta")
    with pytest.raises(ModelError, match="must be loaded whole"):
        save(report, full, None, "nowhere")


def test_weights_that_are_split_over_processes_must_be_loaded_whole() -> None:
    from torch import distributed
    from torch.distributed.tensor import distribute_module, init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = build("llama")
        distribute_module(model.model.layers[0].mlp, init_device_mesh("cpu", (1,)))
        with pytest.raises(ModelError, match="split over processes: load the whole model in one process"):
            modicum.prune(model, ids(), sparsity=0.5)
    finally:
        distributed.destroy_process_group()


def test_adapters_of_a_peft_model_are_merged_first() -> None:
    wrapped = peft.get_peft_model(build("llama"), lora(task_type="CAUSAL_LM"))
    tokens = ids()
    expected = wrapped(tokens).logits
    for model in (wrapped, nn.DataParallel(wrapped), torch.compile(wrapped, backend="eager")):
        assert "model.merge_and_unload()" in refused(model)
    merged = wrapped.merge_and_unload()
    assert_same_logits(merged, merged(tokens).logits, expected)
    report = modicum.prune(merged, tokens, sparsity=0.5)
    assert list(report.masks) == list(modicum.prune(build("llama"), tokens, sparsity=0.5).masks)


def test_adapters_inside_a_plain_model_are_merged_first(tmp_path: Path) -> None:
    base = build("llama")
    wrapped = peft.get_peft_model(build("llama"), lora(task_type="CAUSAL_LM"))
    wrapped.save_pretrained(tmp_path)
    loaded = build("llama")
    loaded.load_adapter(str(tmp_path))
    injected = peft.inject_adapter_in_model(lora(), build("llama"))
    for model in (wrapped.get_base_model(), injected, loaded):
        message = refused(model)
        assert "model.layers.0.self_attn.q_proj" in message
        assert "PeftModel.from_pretrained(base, folder).merge_and_unload()" in message
    merged = peft.PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    assert torch.equal(merged(ids()).logits, wrapped.merge_and_unload()(ids()).logits)
    assert modicum.prune(merged, ids(), sparsity=0.5).achieved == 0.5


def test_a_learned_prompt_has_nothing_to_merge() -> None:
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    wrapped = peft.get_peft_model(build("llama"), prompt)
    assert "model.get_base_model()" in refused(wrapped)
    assert modicum.prune(wrapped.get_base_model(), ids(), sparsity=0.5).achieved == 0.5


def test_what_is_no_transformers_model() -> None:
    assert "Sequential, not a transformers PreTrainedModel" in refused(nn.Sequential(build("llama")))


def test_a_shared_weight_is_told_by_its_other_owner_and_the_remedy_works() -> None:
    tied = build("llama")
    first, second = (f"model.layers.{n}.mlp.up_proj.weight" for n in (0, 1))
    tied.model.layers[1].mlp.up_proj.weight = tied.model.layers[0].mlp.up_proj.weight
    message = refused(tied)
    assert message.startswith(f"{first} is tied to {second}, and pruning one would change the other")
    apply_remedy(tied, message, r"module = .*")
    report = modicum.prune(tied, ids(), sparsity=0.5)
    assert not torch.equal(report.masks[first], report.masks[second])


@pytest.mark.parametrize(
    "shared", ["model.layers.1", "model.layers.1.mlp", "model.layers.1.self_attn.q_proj"]
)
def test_a_module_that_is_used_twice_is_told_by_both_places_and_the_remedy_works(shared: str) -> None:
    model, twin = build("llama"), shared.replace("1", "0", 1)
    model.set_submodule(shared, model.get_submodule(twin))
    message = refused(model)
    assert message.startswith(f"{twin} and {shared} are the same module")
    apply_remedy(model, message, r"model\.set_submodule.*")
    assert modicum.prune(model, ids(), sparsity=0.5).achieved == 0.5


def test_a_weight_tied_to_the_embedding_and_tied_experts() -> None:
    model = build("qwen2")
    model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(model.model.embed_tokens.weight.data[:16])
    message = refused(model)
    assert "model.layers.0.self_attn.q_proj.weight is tied to model.embed_tokens.weight" in message
    experts = build("mixtral")
    experts.model.layers[1].mlp.experts.down_proj = experts.model.layers[0].mlp.experts.down_proj
    message = refused(experts)
    assert "layers.0.mlp.experts.down_proj is tied to model.layers.1.mlp.experts.down_proj" in message
    apply_remedy(experts, message, r"module = .*")
    assert modicum.prune(experts, ids(), sparsity=0.5).achieved == 0.5


def apply_remedy(model: PreTrainedModel, message: str, pattern: str) -> None:
    """Run the Python that a message advises."""
    found = re.search(pattern, message)
    assert found
    exec(found[0], {"model": model, "torch": torch, "copy": copy})
