"""Tiny configurations of every causal-LM type that transformers knows, for models with random weights."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

WINDOW = 10
"""Tokens of a sliding window, and of an attention chunk."""

# Set where a configuration has a field of that name. A field whose default is None stays None, unless it is
# in _FORCED: it often switches a part of the model on.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 96),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "lru_width"), 64),
    **dict.fromkeys(
        ("word_embed_proj_dim", "input_embedding_size", "output_embedding_size", "embedding_dim"), 64
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 96),
    **dict.fromkeys(
        ("d_ff", "ffn_hidden_size", "dense_intermediate_size", "intermediate_size_mlp", "dff"), 96
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 512),
    **dict.fromkeys(("model_max_length", "context_length"), 512),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2
    ),
    **dict.fromkeys(
        ("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts"), 1
    ),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size"), WINDOW),
    **dict.fromkeys(("window_size", "attention_chunk_size"), WINDOW),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "mamba_n_groups"), 2),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "mamba_dt_rank", "time_step_rank"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "hidden_size_per_layer_input", "rotary_dim"), 8),
    **dict.fromkeys(("index_n_heads", "n_mamba_heads", "n_groups"), 2),
    **dict.fromkeys(("swa_num_attention_heads",), 4),
    **dict.fromkeys(("swa_num_key_value_heads",), 2),
    **dict.fromkeys(("swa_head_dim", "swa_v_head_dim", "index_head_dim", "attention_head_dim"), 16),
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_topk": 8,
    "first_k_dense_replace": 1,
}
_FORCED = {"num_key_value_heads", "num_experts", "n_routed_experts", "num_local_experts"}

_FULL, _SLIDING, _LINEAR = "full_attention", "sliding_attention", "linear_attention"
_MLA: dict[str, Any] = {"num_key_value_heads": 4}
_HYBRID: dict[str, Any] = {"layer_types": [_LINEAR, _FULL, _LINEAR, _FULL]}
# What a type needs beside the sizes: layers of every kind it has, and sizes that must fit each other.
_SPECIAL: dict[str, dict[str, Any]] = {
    "axk1": _MLA,
    "axk2": _MLA,
    "bailing_hybrid": {**_MLA, **_HYBRID},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": [_SLIDING, _FULL, _SLIDING, _FULL],
        "rope_parameters": {
            _SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
            _FULL: {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "deepseek_v2": {**_MLA, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA,
    "dots1": {
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
    },
    "dory": {"n_input_layers": 1, "n_output_layers": 1, "layer_types": [_FULL, _SLIDING, _FULL, _FULL]},
    "dots3_note_text": {
        **_MLA,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
        "head_dim": 24,
    },
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_groups": 1},
    "gemma3_text": {"layer_types": [_SLIDING, _FULL, _SLIDING, _FULL]},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": [_SLIDING, _FULL, _SLIDING, _FULL]},
    "gemma4_text": {
        "num_kv_shared_layers": 2,
        "layer_types": [_SLIDING, _FULL, _SLIDING, _FULL],
        "global_head_dim": 32,
    },
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _MLA,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"], "mamba_n_groups": 1},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "kimi_linear": {**_MLA, **_HYBRID},
    "lfm2": {"layer_types": ["conv", _FULL, "conv", _FULL]},
    "lfm2_moe": {"layer_types": ["conv", _FULL, "conv", _FULL]},
    "longcat_flash": {**_MLA, "head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "minicpm3": _MLA,
    "ministral": {"head_dim": 16, "layer_types": [_SLIDING, _FULL, _SLIDING, _FULL]},
    "minimax": {"layer_types": [_LINEAR, _FULL, _LINEAR, _FULL], "block_size": 8},
    "mistral4": _MLA,
    "modernbert-decoder": {"layer_types": [_FULL, _SLIDING, _SLIDING, _FULL]},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_n_groups": 1, "n_groups": 1},
    "qwen4_exp_text": {
        "layer_types": [_LINEAR, "indexed_attention", _LINEAR, "indexed_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_key_value_heads": 1},
    "reformer": {"axial_pos_embds": False, "num_hidden_layers": 6},
    "sarvam_mla": _MLA,
    "xlstm": {"num_heads": 4, "qk_dim_factor": 0.5},
    "xmod": {"default_language": "en_XX"},
    "youtu": _MLA,
    "zamba": {
        "num_hidden_layers": 6,
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
        "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def causal_lm_types() -> list[str]:
    """Every model type that transformers has a causal LM for, in order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A configuration of this type with 2 to 6 layers, hidden size 64 and 96 tokens.

    Layers of every kind that the type has are in it. There are no special tokens but padding.
    """
    config = _tiny(CONFIG_MAPPING[model_type])
    decoder = config.get_text_config(decoder=True)
    if hasattr(decoder, "is_decoder"):
        decoder.is_decoder = True  # an encoder's class is a causal LM only with it
    return config


def _tiny(cls: type[PreTrainedConfig]) -> PreTrainedConfig:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    settings: dict[Any, Any] = {}
    for name, value in _SIZES.items():
        if name in fields and (fields[name].default is not None or name in _FORCED):
            settings[name] = value
    for name in ("bos_token_id", "eos_token_id"):
        if name in fields:
            settings[name] = None
    if "pad_token_id" in fields:
        settings["pad_token_id"] = 0
    if cls.sub_configs:
        base = cls()
        for name in cls.sub_configs:
            part = getattr(base, name, None)
            if name in fields and part is not None:
                settings[name] = _tiny(type(part))
    settings |= _SPECIAL.get(cls.model_type, {})
    # Not every type may be without the tokens that begin and end a text, or the padding.
    for name in (None, "bos_token_id", "eos_token_id", "pad_token_id"):
        settings.pop(name, None)
        try:
            return cls(**settings)
        except Exception as error:  # of whatever kind the type's own checks raise
            failed = error
    raise failed
