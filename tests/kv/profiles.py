"""Head profiles of tiny models with random shares and regressions."""

from __future__ import annotations

import random

import torch
from transformers import PreTrainedModel

from modicum import HeadProfile
from modicum.errors import ModelError
from modicum.kv import head_store
from modicum.kv.fingerprint import weights_digest
from modicum.kv.rotary import rotary_of
from modicum.kv.shape import Shape
from modicum.kv.token_regression import TokenRegression, num_features, why_none


def random_profile(model: PreTrainedModel, seed: int = 0) -> HeadProfile:
    """Shares at 1/8 and 1/2, of which every third head has next to none; a random regression."""
    rng = random.Random(seed)
    shape = Shape.of(model)
    tables = [
        tuple(
            tuple(rng.choice((rng.random(), rng.random() ** 4, 0.0)) * scale for _ in range(layer.kv_heads))
            for layer in shape.layers
        )
        for scale in (0.25, 1.0)
    ]
    skipped = tuple(i for i in range(len(shape.layers)) if i not in shape.full)
    digest = weights_digest(model)
    return HeadProfile(
        (0.125, 0.5), tuple(tables), skipped, digest, regression=random_regression(model, seed)
    )


def random_regression(model: PreTrainedModel, seed: int = 0) -> TokenRegression | None:
    """Of every layer under the budget, of keys before the rotary embedding where the model has one."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {i: s for i, s in enumerate(Shape.of(model).layers) if s.is_full and not why_none(s)}
    weights, intercepts = {}, {}
    for i, shape in shapes.items():
        weights[i] = torch.randn(num_features(shape), shape.kv_heads, generator=rng).half()
        intercepts[i] = torch.randn(shape.kv_heads, generator=rng)
    try:
        rotary_of(model, "", "")
        is_unrotated = True
    except ModelError:
        is_unrotated = False
    return TokenRegression(weights, intercepts, is_unrotated) if shapes else None


def give_profile(model: PreTrainedModel, seed: int = 0) -> HeadProfile:
    """Let `calibrated` and `learned` policies find a random profile for the model."""
    profile = random_profile(model, seed)
    head_store.use_profile(model, profile)
    return profile
