"""Tiny random models of every family the cache is tested on: 2 or 3 layers, hidden 64, 120 tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 120
WINDOW = 10
"""Tokens that the sliding-window layers look back on."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    # Wide weights: attention looks at some tokens far more than at others, and greedy tokens vary.
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_FULL, _SLIDING = "full_attention", "sliding_attention"


def _llama(kv_heads: int = 2, **more: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_COMMON, num_key_value_heads=kv_heads, **more))


def _qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**_COMMON, num_key_value_heads=2, head_dim=16))


def _mistral(window: int | None) -> PreTrainedModel:
    return MistralForCausalLM(
        MistralConfig(**_COMMON, num_key_value_heads=2, head_dim=16, sliding_window=window)
    )


def _phi3() -> PreTrainedModel:
    return Phi3ForCausalLM(Phi3Config(**_COMMON, num_key_value_heads=2, sliding_window=None))


def _gemma2() -> PreTrainedModel:
    kinds = [_SLIDING, _FULL, _FULL]
    config = Gemma2Config(
        **{**_COMMON, "num_hidden_layers": 3},
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        layer_types=kinds,
        # Low enough to bend logits, so that leaving it out would show.
        attn_logit_softcapping=4.0,
    )
    return Gemma2ForCausalLM(config)


def _gemma3() -> PreTrainedModel:
    config = Gemma3TextConfig(
        **{**_COMMON, "num_hidden_layers": 3},
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        layer_types=[_SLIDING, _FULL, _SLIDING],
    )
    return Gemma3ForCausalLM(config)


def _qwen2_windowed() -> PreTrainedModel:
    config = Qwen2Config(
        **_COMMON,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
        layer_types=[_FULL, _SLIDING],
    )
    return Qwen2ForCausalLM(config)


def _gpt_neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**_COMMON))


_BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "llama-mqa": lambda: _llama(kv_heads=1),
    "llama-mha": lambda: _llama(kv_heads=4),
    "qwen3": _qwen3,
    "mistral": lambda: _mistral(None),
    "mistral-window": lambda: _mistral(WINDOW),
    "phi3": _phi3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "qwen2-window": _qwen2_windowed,
    "gpt-neox": _gpt_neox,
}

ALL = tuple(_BUILDERS)
"""Every family."""
FULL = ("llama", "llama-mqa", "llama-mha", "qwen3", "mistral", "phi3", "gpt-neox")
"""Those whose every layer is under the budget."""
HYBRID = ("gemma2", "gemma3", "qwen2-window")
"""Those with some layers under the budget and some with a window."""


def attentions(name: str) -> tuple[str, ...]:
    """The implementations a family can run; sdpa has no soft cap, which Gemma 2 needs."""
    return ("eager",) if name == "gemma2" else ("sdpa", "eager")


def build(
    name: str, dtype: torch.dtype = torch.float32, attention: str | None = None, seed: int = 0
) -> PreTrainedModel:
    """A model of its own, in evaluation mode; the same arguments give the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _BUILDERS[name]()
    model.set_attn_implementation(attention or attentions(name)[0])
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


@cache
def shared(name: str, dtype: torch.dtype = torch.float32, attention: str | None = None) -> PreTrainedModel:
    """The same model for every test that neither detaches nor changes it."""
    return build(name, dtype, attention)


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """[rows, length] random ids, none of them padding."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (rows, length), generator=rng)
