"""What both sides of `agree_kvpress.py` share: tiny models from one file of weights, and tasks as JSON.

It imports neither modicum nor kvpress, as each side runs in an environment of its own.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

_VOCABULARY = 128


@dataclass(frozen=True)
class Tiny:
    """A random model: its sizes and its seed."""

    family: str
    seed: int = 0
    layers: int = 3
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """What its file of weights is called."""
        return f"{self.family}-{self.dtype}-{self.head_dim}-{self.seed}"

    def build(self) -> PreTrainedModel:
        """The model, with whatever weights."""
        config, model = {
            "llama": (LlamaConfig, LlamaForCausalLM),
            "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        }[self.family]
        settings = config(
            vocab_size=_VOCABULARY,
            hidden_size=self.hidden,
            intermediate_size=2 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        return model(settings).to(getattr(torch, self.dtype)).eval()

    def write(self, folder: Path) -> None:
        """Make the weights; norms are drawn too, as equal ones would give all of Qwen3's keys one length."""
        rng = torch.Generator().manual_seed(self.seed)
        weights = {}
        for key, old in self.build().state_dict().items():
            if old.dim() == 1:
                new = 0.5 + torch.rand(old.shape, generator=rng)
            else:
                new = torch.randn(old.shape, generator=rng) * 1.5 * old.shape[1] ** -0.5
            weights[key] = new.to(old.dtype)
        save_file(weights, folder / f"{self.name}.safetensors")

    def load(self, folder: Path) -> PreTrainedModel:
        """The model with the weights that `write` made."""
        model = self.build()
        model.load_state_dict(load_file(folder / f"{self.name}.safetensors"))
        return model


@dataclass(frozen=True)
class Task:
    """One prefill to be compressed: which press, how many entries a head is to keep, of which tokens."""

    key: str
    press: str
    model: Tiny
    ids: list[list[int]]
    pads: list[int]
    """Columns of padding at the left of each row."""
    budget: int
    window: int
    beta: float = 20
    kept: bool = True
    """Whether the positions kept are wanted, or the bytes only."""


def random_ids(rows: int, tokens: int, pads: list[int], seed: int) -> list[list[int]]:
    """Random token ids, 0 for padding and nothing else."""
    ids = torch.randint(1, _VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    for row, count in enumerate(pads):
        ids[row, :count] = 0
    return ids.tolist()


def padding(pads: list[int], columns: int) -> torch.Tensor:
    """[B, columns] int64: 0 for a pad."""
    return (torch.arange(columns) >= torch.tensor(pads)[:, None]).long()


def write_tasks(tasks: list[Task], path: Path) -> None:
    """Tasks as JSON."""
    path.write_text(json.dumps([asdict(task) for task in tasks]), encoding="utf-8")


def read_tasks(path: Path) -> list[Task]:
    """What `write_tasks` wrote."""
    return [
        Task(**{**raw, "model": Tiny(**raw["model"])}) for raw in json.loads(path.read_text(encoding="utf-8"))
    ]
