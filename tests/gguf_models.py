"""Tiny models written as GGUF files with the gguf package, beside the weights that they were written from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

CONTROL, BYTE, NORMAL = 3, 6, 1
TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ Ġ", "Ġ w"]
_THETA = 10000.0
_EPSILON = 2.0**-17  # exact in float32, in which a GGUF file stores it


def byte_alphabet() -> list[str]:
    """GPT-2's spelling of the bytes 0 to 255, worked out as its encoder.py describes."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    spelling = {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return [spelling[byte] for byte in range(256)]


def byte_level_tokens() -> list[str]:
    """Three control tokens, the bytes, and what the merges make."""
    return ["<unk>", "<s>", "</s>", *byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)]


def build(kind: str, vocabulary: int, seed: int = 0) -> PreTrainedModel:
    """A random model in evaluation mode; `kind` is what GGUF calls its architecture."""
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": _EPSILON,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "rope_theta": _THETA,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "llama":
            return LlamaForCausalLM(LlamaConfig(**common)).eval()
        return Qwen2ForCausalLM(Qwen2Config(**common)).eval()


_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf_name(name: str) -> str:
    stem, _, ending = name.rpartition(".")
    if stem in _NAMES:
        return f"{_NAMES[stem]}.{ending}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[part]}.{ending}"


def _interleaved(weight: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Rows of each head from halves (transformers) to pairs (llama.cpp), which rotate together."""
    rows = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, -1)
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write(
    path: Path,
    model: PreTrainedModel,
    kind: str,
    *,
    tokenizer: str = "gpt2",
    pre: str = "gpt-2",
    quantised: bool = False,
) -> None:
    """Write a model; `quantised` stores matrices as Q8_0."""
    import gguf

    config: Any = model.config
    writer = gguf.GGUFWriter(path, kind)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(_THETA)
    writer.add_layer_norm_rms_eps(_EPSILON)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model(tokenizer)
    if tokenizer == "gpt2":
        vocabulary = byte_level_tokens()
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges(MERGES)
        kinds = [CONTROL] * 3 + [NORMAL] * (len(vocabulary) - 3)
    else:
        vocabulary, scores = sentencepiece_tokens()
        writer.add_token_scores(scores)
        kinds = [CONTROL] * 3 + [BYTE] * 256 + [NORMAL] * (len(vocabulary) - 259)
    writer.add_token_list(vocabulary)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            weight = tensor.float().numpy()
            if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
                heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
                weight = _interleaved(weight, heads)
            if quantised and weight.ndim == 2:
                form = gguf.GGMLQuantizationType.Q8_0
                stored = gguf.quantize(weight, form)
                writer.add_tensor(_gguf_name(name), stored, raw_dtype=form)
            else:
                writer.add_tensor(_gguf_name(name), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def round_to_q8(model: PreTrainedModel) -> None:
    """Round a model's matrices as Q8_0 stores them: a float16 scale for 32 numbers, and int8 multiples."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.ndim == 2:
                groups = tensor.reshape(-1, 32)
                scale = groups.abs().amax(1, keepdim=True) / 127
                steps = (groups / scale).numpy()
                steps = np.trunc(steps + np.copysign(0.5, steps))  # half away from zero, as ggml rounds
                tensor.copy_((torch.from_numpy(steps) * scale.half().float()).reshape(tensor.shape))


def tokens(tokenizer: str) -> list[str]:
    """The vocabulary of a kind of tokenizer, as GGUF names the kinds."""
    return byte_level_tokens() if tokenizer == "gpt2" else sentencepiece_tokens()[0]


def sentencepiece_tokens() -> tuple[list[str], list[float]]:
    """Control and byte tokens, letters, and words that merge; better scores merge first."""
    words = ["▁", *"abcdefghijklmnopqrstuvwxyz", "he", "ll", "hell", "hello", "▁hello", "▁w"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    return tokens, [0.0] * 259 + [-float(i) for i in range(len(words))]
