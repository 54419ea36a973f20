"""A tiny causal LM in a folder, for tests that load one: random weights, a SentencePiece-like tokenizer."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 512
NUM_POSITIONS = 512
NUM_PARAMETERS = 260_032

_VARIABLE = "MODICUM_TEST_TINY_MODEL"
_SPECIAL = ["<unk>", "<s>", "</s>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_TEXT = (
    "Once upon a time, a girl named Mira sold fresh bread in the old harbour. She had a small dog. "
    "There was a boy named Tom, who had a small red boat. Tom loved to play with it in the water. One day "
    "the wind took the boat too far away, and then he was sad. The dog saw that and wanted to help. The bird "
    "was blue and happy, and they were friends from that day on. What did she say when mom asked about the "
    "yellow fish? She said that many animals of the wood live under the old green bridge. They looked for "
    "their black hens, but could not find where those had gone. Every morning some children walked through "
    "our garden, opened its gate without any noise, and counted seven quiet rabbits among tall cabbages."
)


def _train_tokenizer() -> Any:
    """BPE in which "▁" is a space, words begin with it, and a character without an entry is its bytes."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    num_pieces = VOCAB_SIZE - len(_SPECIAL) - len(_BYTES)
    learner.train_from_iterator([_TEXT], trainers.BpeTrainer(vocab_size=num_pieces, show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    pieces = sorted(learnt["vocab"], key=learnt["vocab"].get)
    vocab = {piece: index for index, piece in enumerate([*_SPECIAL, *_BYTES, *pieces])}
    assert len(vocab) == VOCAB_SIZE
    merges = [tuple(pair) for pair in learnt["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def _build(folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=NUM_POSITIONS,
        # Wide weights: attention looks at some tokens far more than at others, and greedy tokens vary.
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        with torch.no_grad():  # it hardly ever says a single byte or the end token, so that its text is text
            model.model.embed_tokens.weight[: len(_SPECIAL) + len(_BYTES)] *= 0.1
    model.save_pretrained(folder)
    _train_tokenizer().save_pretrained(folder)


def _folder() -> Path:
    """The folder, made once; a process that a test starts finds its parent's through the environment."""
    if _VARIABLE not in os.environ:
        made = tempfile.mkdtemp(prefix="modicum-tiny-")
        atexit.register(shutil.rmtree, made, ignore_errors=True)
        _build(Path(made))
        os.environ[_VARIABLE] = made
    return Path(os.environ[_VARIABLE])


TINY_MODEL = _folder()
"""A Llama of 260,032 random weights: 5 layers, 8 query and 4 KV heads of 8, 512 positions, 512 tokens."""
