"""All that the training of the reference model depends on, in one frozen dataclass."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from modicum.errors import InputError


@dataclass(frozen=True)
class Stage:
    """One length of the curriculum.

    Attributes:
        length: tokens in a sequence.
        batch: tokens in an optimiser step.
        shares: how often each kind of sequence comes (see `documents.KINDS`); they need not sum to 1.
        tokens: at most so many tokens are spent here before going on anyway.
        rate: factor of the learning rates.
        whole: all of the tokens are spent, however many answers are right.
    """

    length: int
    batch: int
    shares: dict[str, float]
    tokens: int
    rate: float = 1.0
    whole: bool = False


_SHORT = {"copy": 0.4, "table": 0.6}
_EARLY = {"copy": 0.1, "table": 0.3, "keys": 0.25, "needle": 0.2, "chain": 0.1, "text": 0.05}
_MIDDLE = {"copy": 0.04, "table": 0.04, "keys": 0.32, "needle": 0.28, "chain": 0.26, "text": 0.06}
_BACK = {"copy": 0.1, "table": 0.2, "back": 0.7}
_BACK_SOON = {"copy": 0.05, "table": 0.1, "back": 0.45, "keys": 0.1, "chain": 0.3}
_AGAIN = {
    "copy": 0.03,
    "table": 0.03,
    "back": 0.12,
    "keys": 0.27,
    "needle": 0.24,
    "chain": 0.27,
    "text": 0.04,
}
_LISTS = {"copy": 0.08, "table": 0.1, "back": 0.12, "several": 0.7}
_LISTS_SOON = {"copy": 0.05, "back": 0.15, "several": 0.45, "keys": 0.15, "chain": 0.2}
_ALL = {"copy": 0.03, "back": 0.07, "several": 0.1, "keys": 0.27, "needle": 0.25, "chain": 0.24, "text": 0.04}
_LONG = {
    "copy": 0.04,
    "table": 0.03,
    "keys": 0.16,
    "needle": 0.36,
    "chain": 0.26,
    "count": 0.02,
    "text": 0.13,
}
_MORE = {"back": 0.05, "several": 0.3, "keys": 0.25, "needle": 0.22, "chain": 0.15, "text": 0.03}
_EXACT = {"copy": 0.03, "exact": 0.7, "several": 0.07, "back": 0.05, "chain": 0.15}
_CARRY = {"exact": 0.8, "back": 0.1, "several": 0.05, "chain": 0.05}
_ALL_EXACT = _ALL | {"exact": 0.4}
_LAST = {
    "copy": 0.03,
    "several": 0.04,
    "keys": 0.19,
    "needle": 0.38,
    "chain": 0.22,
    "count": 0.02,
    "text": 0.12,
}
_LAST_EXACT = _LAST | {"exact": 0.1}
_LAST_CHAINS = _LAST_EXACT | {"chain": 0.4, "exact": 0.05, "several": 0.02, "copy": 0.02, "text": 0.08}
_LAST_PAIRS = _LAST | {"needle": 0.5, "chain": 0.26, "keys": 0.17, "exact": 0.03, "text": 0.14}
_LAST_TURN = {"chain": 0.55, "needle": 0.25, "keys": 0.1, "several": 0.02, "text": 0.08}


def _stages() -> tuple[Stage, ...]:
    return (
        Stage(64, 4096, _SHORT, 1_500_000),
        Stage(128, 4096, _EARLY, 2_000_000, 0.7),
        Stage(256, 4096, _MIDDLE, 7_600_000, 0.6),
        Stage(512, 4096, _MIDDLE, 6_400_000, 0.5),
        Stage(1024, 8192, _LONG, 3_300_000, 0.6),
        Stage(2048, 8192, _LONG, 1_200_000, 0.6),
        Stage(64, 4096, _BACK, 1_500_000, 0.6),
        Stage(128, 4096, _BACK_SOON, 1_500_000, 0.6),
        Stage(256, 4096, _AGAIN, 1_300_000, 0.6),
        Stage(64, 4096, _LISTS, 800_000, 0.6),
        Stage(128, 4096, _LISTS_SOON, 700_000, 0.6),
        Stage(256, 4096, _ALL, 3_000_000, 0.6),
        Stage(256, 4096, _MORE, 1_200_000, 0.6),
        Stage(512, 4096, _ALL, 800_000, 0.6),
        Stage(1024, 8192, _LAST, 1_250_000, 0.6),
        Stage(2048, 8192, _LAST, 700_000, 0.6),
        Stage(4096, 8192, _LAST, 2_600_000, 0.6),
        Stage(256, 4096, _EXACT, 3_000_000, 0.6),
        Stage(256, 4096, _ALL_EXACT, 1_450_000, 0.6),
        Stage(256, 4096, _EXACT, 2_200_000, 0.6),
        Stage(256, 4096, _ALL_EXACT, 2_200_000, 0.6),
        Stage(256, 4096, _EXACT, 2_000_000, 0.6),
        Stage(64, 4096, _CARRY, 3_600_000, 0.6),
        Stage(256, 4096, _ALL_EXACT, 2_000_000, 0.6),
        Stage(1024, 8192, _LAST_EXACT, 1_200_000, 0.6),
        Stage(2048, 8192, _LAST_EXACT, 1_200_000, 0.6),
        Stage(4096, 8192, _LAST_EXACT, 2_200_000, 0.5),
        Stage(128, 4096, _CARRY, 4_000_000, 0.6),
        Stage(256, 4096, _ALL_EXACT, 1_500_000, 0.6),
        Stage(1024, 8192, _LAST_EXACT, 1_000_000, 0.6),
        Stage(2048, 8192, _LAST_EXACT, 1_000_000, 0.6),
        Stage(4096, 8192, _LAST_EXACT, 2_000_000, 0.5),
        Stage(2048, 8192, _LAST_CHAINS, 400_000, 0.35),
        Stage(4096, 8192, _LAST_CHAINS, 900_000, 0.35),
        Stage(256, 4096, _ALL_EXACT, 600_000, 0.5, whole=True),
        Stage(1024, 8192, _LAST_PAIRS, 700_000, 0.5, whole=True),
        Stage(2048, 8192, _LAST_PAIRS, 600_000, 0.5, whole=True),
        Stage(4096, 8192, _LAST_PAIRS, 3_000_000, 0.5, whole=True),
        Stage(2048, 8192, _LAST_TURN, 900_000, 0.4, whole=True),
        Stage(4096, 8192, _LAST_TURN, 500_000, 0.4, whole=True),
    )


@dataclass(frozen=True)
class Recipe:
    """The settings of one training run.

    Attributes:
        vocabulary: entries of the tokenizer.
        hidden, mlp, layers, heads, kv_heads, head_dim: the Llama's sizes.
        rope_theta: base of the rotary frequencies; so large that half of a head's few dimensions hardly turn
            within `positions`, as tokens far apart can only be matched in those.
        positions: the longest context the model is meant for; gaps in the positions of short sequences are
            drawn so that distances up to this occur from the start.
        stages: the curriculum; a stage ends when `pass_mark` of its answers are chosen right (mean of the
            kinds over the last steps), or when its tokens are spent.
        pass_mark: as said.
        matrix_rate: Muon's learning rate for the layers' matrices.
        vector_rate: AdamW's for the head and the norms.
        embedding_rate: AdamW's for the embeddings, whose entries start near 1.
        weight_decay: of the matrices.
        choice_weight: weight of the token that chooses an answer.
        answer_weight: weight of an answer's other tokens; a number of seven digits must be right in each.
        text_weight: weight of a token of plain text.
        other_weight: weight of a generated token that cannot be known beforehand, or only by its form.
        guided: heads, each as layer and query head, that are told where to look (see `guide`).
        guide_weight: weight of the loss that tells them, in which an answer's tokens that are in no doubt
            count a tenth of those that choose.
        warmup: steps in which the rates rise.
        cooldown: the share of `total_tokens` at whose end the rates fall to a twentieth.
        total_tokens: the length of the run.
        first_heads: whether the first layer's heads start by looking one to three tokens back (see `start`).
        gaps: how often a sequence's positions skip some, so that short sequences know long distances (Zhu et
            al. 2023, "PoSE").
        seed: of weights and data.
        held_back: files whose names begin so are kept for measuring perplexity.
    """

    vocabulary: int = 2048
    hidden: int = 192
    mlp: int = 384
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    rope_theta: float = 1e8
    positions: int = 4096
    stages: tuple[Stage, ...] = field(default_factory=_stages)
    pass_mark: float = 0.93
    matrix_rate: float = 0.02
    vector_rate: float = 3e-3
    embedding_rate: float = 0.02
    weight_decay: float = 0.01
    choice_weight: float = 5.0
    answer_weight: float = 3.0
    text_weight: float = 0.4
    other_weight: float = 0.05
    guided: tuple[tuple[int, int], ...] = ((4, 4), (4, 6))
    guide_weight: float = 1.0
    warmup: int = 30
    cooldown: float = 0.0093
    total_tokens: int = 75_500_000
    first_heads: bool = True
    gaps: float = 0.5
    seed: int = 1
    held_back: tuple[str, ...] = ("burgess-busterbrown", "austen-sense", "shakespeare-caesar")

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.layers < 1 or self.heads % self.kv_heads:
            raise InputError(
                f"{self.heads} query heads cannot share {self.kv_heads} KV heads: give a multiple of them"
            )
        for layer, head in self.guided:
            if not (0 <= layer < self.layers and 0 <= head < self.heads):
                raise InputError(
                    f"there is no head {head} in layer {layer} to guide: the model has {self.layers} layers "
                    f"of {self.heads} heads, counted from 0"
                )
        if max(stage.length for stage in self.stages) > self.positions:
            raise InputError(f"a stage is longer than the model's {self.positions} positions")

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)
