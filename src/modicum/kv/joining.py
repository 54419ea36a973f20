"""Joining: whether the decode steps of all layers can go together, and have one graph; if not, why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modicum.kv.layer import BudgetLayer


def why_apart(layers: Sequence[BudgetLayer]) -> str | None:
    """Why the steps of these layers cannot go together; None if they can."""
    policy = layers[0].setting.policy
    if policy.head_shares() is not None:
        return f"{policy} lets heads compete, so that every head of every row has an arena of its own"
    if not policy.traceable:
        return f"{policy} decides by what it finds in its scores"
    if any(layer.shape.is_latent for layer in layers):
        return "the model keeps latents from which keys and values are expanded"
    if any(layer.shape.has_sinks for layer in layers):
        return "the model's attention has learned sinks"
    if any(layer.shape.num_readers for layer in layers):
        return "some of the model's layers read other layers' keys and values"
    if policy.needs_output_weight:
        return f"{policy} reads the output projection of each layer"
    if any(layer.shape != layers[0].shape for layer in layers):
        return "the model's layers are of unlike shapes"
    ragged = any(len(set(zip(layer.capacities, layer.streaming, strict=True))) > 1 for layer in layers)
    if policy.query_rows and ragged:
        return f"{policy} reads queries of heads of unlike capacity"
    return None


def why_no_graph(layers: Sequence[BudgetLayer], cache_layers: int) -> str | None:
    """Why the steps of these layers, of so many in the cache, cannot have one graph; None if they can."""
    if len(layers) < cache_layers:
        return "the model has layers of other kinds than full attention"
    policy, budget, shared = layers[0].setting.policy, layers[0].setting.budget, layers[0].shared
    if not policy.evicts:
        return f"{policy} never evicts, so its steps grow: use transformers' StaticCache"
    if (apart := why_apart(layers)) is not None:
        return apart
    if budget.evict_every > 1:
        return "evict_every is above 1, so not all steps are alike"
    if shared.turning is not None:
        return "positions are renumbered, which sorts them anew at each step"
    if shared.spread:
        return "the model lies on several devices, or is offloaded"
    return None
