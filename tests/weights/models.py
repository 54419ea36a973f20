"""Small random models of the families that can be pruned."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_LLAMA = {**SHAPE, "intermediate_size": 24, "num_key_value_heads": 1, "initializer_range": 0.3}

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_LLAMA)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_LLAMA, sliding_window=None)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**_LLAMA)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SHAPE, ffn_dim=24, word_embed_proj_dim=16, init_std=0.3)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**SHAPE, intermediate_size=24, initializer_range=0.3)
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    ),
    "qwen2-moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **_LLAMA,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
            num_experts=4,
            num_experts_per_tok=2,
        )
    ),
}


def build(name: str) -> PreTrainedModel:
    """The same weights each time."""
    torch.manual_seed(0)
    model = FAMILIES[name]()
    for parameter in model.parameters():  # random biases, as trained ones are not zero
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.train(False)
    return model


def ids(rows: int = 6, length: int = 32, seed: int = 1) -> torch.Tensor:
    """[n, T] random tokens."""
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
