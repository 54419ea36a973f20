"""Fingerprint: tells a model (configuration, weights, tokenizer), or a sample, from another of its name."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from modicum.tasks.sample import Sample

_EDGE = 16  # numbers at each end of a tensor
# What differs between two loads of the same files, or between releases of transformers.
_PASSING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation")


def fingerprint(model: Any, tokenizer: Any) -> str:
    """sha256 over configuration, vocabulary, and every tensor's name, shape and first and last numbers.

    Cheap, and blind to a change in the middle of a tensor alone, which no training makes.
    """
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        digest.update(json.dumps(value, sort_keys=True, default=str).encode() + b"\n")

    config = {k: v for k, v in model.config.to_dict().items() if k not in _PASSING}
    add(config)
    add(tokenizer.get_vocab())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        edges = torch.cat([flat[:_EDGE], flat[-_EDGE:]]).to("cpu", torch.float64)
        add([name, list(tensor.shape), edges.tolist()])
    return digest.hexdigest()


def sample_fingerprint(sample: Sample) -> str:
    """sha256 of all that a model is asked and should say."""
    asked = [sample.context, sample.question, sample.answers, sample.target, sample.metric]
    return hashlib.sha256(json.dumps([*asked, sample.max_new_tokens]).encode()).hexdigest()
