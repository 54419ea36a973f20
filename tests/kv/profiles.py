"""Head profiles of tiny models with random shares."""

from __future__ import annotations

import random

from transformers import PreTrainedModel

from modicum import HeadProfile
from modicum.kv import head_store
from modicum.kv.fingerprint import weights_digest
from modicum.kv.shape import Shape


def random_profile(model: PreTrainedModel, seed: int = 0) -> HeadProfile:
    """Shares at 1/8 and 1/2, of which every third head has next to none."""
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
    return HeadProfile((0.125, 0.5), tuple(tables), skipped, weights_digest(model))


def give_profile(model: PreTrainedModel, seed: int = 0) -> HeadProfile:
    """Let `calibrated` policies find a random profile for the model."""
    profile = random_profile(model, seed)
    head_store.use_profile(model, profile)
    return profile
