"""Where the reference model's weights start.

A transformer from random weights needs millions of tokens until it copies: a head of one layer has to write
down which token came before, a head of a later one to look for it (Olsson et al. 2022, "In-context learning
and induction heads"). On two CPU cores that is most of an hour, so the start leans that way; training does
the rest and may undo it. In the spirit of Trockman and Kolter 2023 ("Mimetic initialization of attention"):

- a key head is its first query head's copy, so a head attends to tokens like its own;
- what a head writes is what it reads (the output projection is the values' transposed), and the head of the
  language model is a small copy of the embeddings, so an attended token is a likely next one;
- embeddings share a constant part, by which a head can look for a place instead of a token: in the first
  layer the heads of half of the KV heads look 1, 2, 1 and 3 tokens back, and note what they see in directions
  of their own; in the second half of the heads look for tokens with such a note of the token now read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modicum.reference.recipe import Recipe

_CONSTANT = 0.7  # the constant part's entry, beside 1 for the token's own
_COPY = 0.05  # the head's scale: a token recognised without doubt gets a logit of about ten
_LOOK = 7.0  # |q| and |k| of each frequency where a head looks for a place
_BACK = (1, 2, 1, 3)
_MATCH = 4.0  # gain of query and key that match a token with a note of it


@torch.no_grad()
def prepare(model: Any, recipe: Recipe) -> None:
    """Sets the weights of a LlamaForCausalLM as said above; uses torch's global generator."""
    embeddings = model.model.embed_tokens.weight
    nn.init.normal_(embeddings)
    signs = torch.where(torch.rand(recipe.hidden) < 0.5, -1.0, 1.0)
    # No share of that direction, and one norm: or each token would look for a place more or less strongly.
    embeddings.sub_(torch.outer(embeddings @ signs / recipe.hidden, signs))
    embeddings.mul_(recipe.hidden**0.5 / embeddings.norm(dim=1, keepdim=True))
    model.lm_head.weight.copy_(_COPY * embeddings)
    embeddings.add_(_CONSTANT * signs)
    scale = (2 * recipe.layers) ** -0.5
    size = recipe.head_dim
    group = recipe.heads // recipe.kv_heads
    # Far tokens match in the dimensions that hardly turn on the way.
    slow = 0.1 + 0.9 * (_angles(recipe) * recipe.positions < 1.5).float().repeat(2)
    notes = torch.empty(recipe.kv_heads, group, size, recipe.hidden)
    read = torch.empty(recipe.kv_heads, size, recipe.hidden)
    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        query = attention.q_proj.weight.view(recipe.kv_heads, group, size, recipe.hidden)
        key = attention.k_proj.weight.view(recipe.kv_heads, size, recipe.hidden)
        value = attention.v_proj.weight.view(recipe.kv_heads, size, recipe.hidden)
        out = attention.o_proj.weight.view(recipe.hidden, recipe.kv_heads, group, size)
        for head in range(recipe.kv_heads):
            for one in range(group):
                nn.init.orthogonal_(query[head, one])
            key[head] = query[head, 0]
            nn.init.orthogonal_(value[head])
            out[:, head] = scale * value[head].T[:, None]
        nn.init.orthogonal_(layer.mlp.down_proj.weight, gain=scale)
        if number == 0 and recipe.first_heads:
            for place, back in enumerate(_BACK[: recipe.kv_heads // 2 * group]):
                head, one = divmod(place, group)
                query[head, one], key[head] = _look_back(signs, back, recipe)
                nn.init.orthogonal_(notes[head, one])
                out[:, head, one] = notes[head, one].T
                read[head] = value[head]
        if number == 1 and recipe.first_heads:
            for head in range(recipe.kv_heads // 2):
                query[head] = _MATCH * slow[:, None] * read[head]
                key[head] = _MATCH * slow[:, None] * notes[head, 0]


def _look_back(signs: Tensor, back: int, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Query and key projections, [head_dim, hidden], of a head that attends `back` tokens before its own."""
    half = recipe.head_dim // 2
    angles = back * _angles(recipe)
    # After RoPE a query at n and a key at m differ by the angle (n - m) θ: turning the query by -back θ
    # beforehand puts the maximum at m = n - back.
    query = torch.cat((angles.cos(), -angles.sin()))
    key = torch.cat((torch.ones(half), torch.zeros(half)))
    reader = signs / (recipe.hidden * _CONSTANT / (1 + _CONSTANT**2) ** 0.5)  # 1 for a normed embedding
    return _LOOK * torch.outer(query, reader), _LOOK * torch.outer(key, reader)


def _angles(recipe: Recipe) -> Tensor:
    """The angle of each pair of dimensions per position, [head_dim / 2]."""
    half = recipe.head_dim // 2
    return recipe.rope_theta ** (-torch.arange(half) / half)
