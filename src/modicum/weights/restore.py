"""Restore: a model out of a packed file, its weights unpacked once, or each time they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from modicum.errors import ModelError
from modicum.weights import packed
from modicum.weights.packed import PackedLinear

Form = Literal["dense", "packed"]


def restore(folder: Path, dtype: torch.dtype | str, form: Form = "dense") -> PreTrainedModel:
    """The model.

    Args:
        dtype: "auto" for that in which it was pruned.
        form: "dense" unpacks once: the memory and speed of the dense model. "packed" keeps linear layers
            packed and unpacks one at a time: small, and slower; experts are unpacked all the same.

    Raises:
        ModelError: the file is damaged, or lacks weights that its configuration calls for.
    """
    header, tensors = packed.read(folder)
    read: Any = AutoConfig
    config = read.from_pretrained(folder)
    if dtype == "auto":
        saved = (header["dtypes"][name] for name in header["pruned"])
        dtype = getattr(torch, next(saved, "float32"))
    build: Any = AutoModelForCausalLM
    model: Any = build.from_config(config, dtype=dtype)
    linear = {}
    if form == "packed":
        modules = dict(nn.Module.named_modules(model))
        for name in header["pruned"]:
            owner = modules.get(name.removesuffix(".weight"))
            if type(owner) is nn.Linear:
                linear[name] = owner
    rest = {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in linear}
    pruned = {n: shape for n, shape in header["pruned"].items() if n not in linear}
    missing, unknown = model.load_state_dict(packed.dense({**header, "pruned": pruned}, rest), strict=False)
    model.tie_weights()
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    lost = [n for n in missing if n not in linear and n not in tied and not _shared(model, n, tensors)]
    if lost or unknown:
        raise ModelError(
            f"{folder / packed.FILE} and its config.json are not of one model: {(lost or unknown)[0]} is "
            f"{'missing' if lost else 'not known'}; prune the model again"
        )
    for name, owner in linear.items():
        where, _, own = name.removesuffix(".weight").rpartition(".")
        bits, values = tensors[f"{name}.mask"], tensors[f"{name}.values"]
        if values.itemsize > owner.weight.itemsize:
            values = values.to(owner.weight.dtype)
        bias = None if owner.bias is None else owner.bias.data
        layer = PackedLinear(bits, values, owner.in_features, bias)
        setattr(model.get_submodule(where), own, layer)
    found: PreTrainedModel = model
    return found


def _shared(model: nn.Module, name: str, there: dict[str, Any]) -> bool:
    """Whether a weight is another's, which is there."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    mine = parameters.get(name)
    if mine is None:
        return False
    return any(n != name and p.data_ptr() == mine.data_ptr() and (n in there) for n, p in parameters.items())
