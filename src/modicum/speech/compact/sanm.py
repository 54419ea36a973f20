"""SAN-M encoder: self-attention with a depthwise memory, whose layers may share weights, with a CTC output.

The layer is that of FunASR's SAN-M encoder (Gao et al. 2020, arXiv 2006.01713), for input x of layer i and
its weight set s:

    Q, K, V = split(norm(x) W_qkv^s + b_qkv^i)
    att     = softmax(Q K^T / sqrt(d_k)) V W_out^s + b_out^i
    mem     = mask ⊙ dropout(V + depthwise^i(pad(V)))
    y       = x + att + mem
    z       = y + ReLU(norm(y) W_up^s + b_up^i) W_down^s + b_down^i

The large matrices belong to the set. Norms, biases and the depthwise memory belong to the layer. Sharing over
layers is the idea of arXiv 2104.05784, of which we read the abstract only: maps, recovery terms, the strided
convolution in front, norms before sublayers and the absence of a position encoding (the memory orders the
frames) are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modicum.errors import InputError
from modicum.speech.acoustic_model import AcousticModel, ModelSettings, inside, register
from modicum.speech.compact.sharing import Sharing, sharing_map
from modicum.speech.frame_norm import FrameNorm

ALL = -1
"""Frames of context: all there are."""


@register
@dataclass(frozen=True)
class SanmSettings(ModelSettings):
    """Sizes of a `SanmEncoder`.

    Attributes:
        width: d.
        num_layers: L, layers that are computed.
        num_heads: of the attention; d is a multiple.
        hidden: units between W_up and W_down.
        kernel: taps of the depthwise memory, odd.
        shift: frames by which the memory is moved to the past; (kernel - 1) / 2 makes it causal.
        attention_left, attention_right: output frames that attention sees on each side; -1 for all.
        sharing: see `modicum.speech.compact.sharing.Sharing`.
        num_sets: u, sets of weights; not read by sharing "none" and "all".
        rank: of a low-rank term B A that each layer adds to each matrix of its set; 0 for none.
        adapter: units of a bottleneck x + W_b ReLU(W_a norm(x)) behind each layer; 0 for none.
        dropout: probability, in training.
        subsampling: stride of the first convolution.

    Raises:
        InputError: a number is out of range.
    """

    name: ClassVar[str] = "sanm"
    subsampling: int = 4
    width: int = 128
    num_layers: int = 6
    num_heads: int = 4
    hidden: int = 384
    kernel: int = 11
    shift: int = 0
    attention_left: int = ALL
    attention_right: int = ALL
    sharing: Sharing = "none"
    num_sets: int = 1
    rank: int = 0
    adapter: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self._check_positive("subsampling", "width", "num_layers", "num_heads", "hidden", "kernel")
        if self.width % self.num_heads:
            raise InputError(
                f"{self.num_heads} heads do not divide a width of {self.width}: give a multiple of the heads"
            )
        if self.kernel % 2 == 0:
            raise InputError(f"the kernel has {self.kernel} taps: give an odd number")
        if not 0 <= self.shift <= self.kernel // 2:
            raise InputError(
                f"the memory of {self.kernel} taps is shifted by {self.shift}: give 0 to {self.kernel // 2}"
            )
        for name in ("attention_left", "attention_right"):
            if getattr(self, name) < ALL:
                raise InputError(f"{name} is {getattr(self, name)}: give frames, or -1 for all")
        if self.rank < 0 or self.adapter < 0:
            raise InputError(
                f"the rank is {self.rank} and the adapter has {self.adapter} units: give 0 or more"
            )
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}: give a share from 0 to below 1")
        self.sets  # noqa: B018  # checks the rest

    @property
    def sets(self) -> tuple[int, ...]:
        """s(i): the weight set of each layer."""
        return sharing_map(self.sharing, self.num_layers, self.num_sets)

    def build(self, num_features: int, num_classes: int) -> SanmEncoder:
        return SanmEncoder(self, num_features, num_classes)


class WeightSet(nn.Module):
    """The matrices that layers may share, each [outputs, inputs]."""

    def __init__(self, settings: SanmSettings) -> None:
        super().__init__()
        d, hidden = settings.width, settings.hidden
        self.qkv = _matrix(3 * d, d)
        self.out = _matrix(d, d)
        self.up = _matrix(hidden, d)
        self.down = _matrix(d, hidden)


class LowRank(nn.Module):
    """B A for each matrix of a set: what one layer adds to it. B starts at 0."""

    def __init__(self, settings: SanmSettings) -> None:
        super().__init__()
        for name, matrix in WeightSet(settings).named_parameters():
            num_outputs, num_inputs = matrix.shape
            self.register_parameter(f"{name}_a", _matrix(settings.rank, num_inputs))
            self.register_parameter(f"{name}_b", nn.Parameter(torch.zeros(num_outputs, settings.rank)))

    def added(self, name: str, x: Tensor) -> Tensor:
        """x A^T B^T of a matrix."""
        # By getattr: in a refining they are rounded tensors, which are no parameters.
        return F.linear(F.linear(x, getattr(self, f"{name}_a")), getattr(self, f"{name}_b"))


class Adapter(nn.Module):
    """x + W_b ReLU(W_a norm(x) + b_a) + b_b (Houlsby et al. 2019, arXiv 1902.00751). W_b starts at 0."""

    def __init__(self, settings: SanmSettings) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(settings.width)
        self.down = nn.Linear(settings.width, settings.adapter)
        self.up = nn.Linear(settings.adapter, settings.width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.up(self.down(self.norm(x)).relu())
        return x + added


class SanmLayer(nn.Module):
    """One use of a weight set, with what belongs to the layer alone."""

    def __init__(self, settings: SanmSettings) -> None:
        super().__init__()
        d = settings.width
        self.settings = settings
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv_bias, self.out_bias = nn.Parameter(torch.zeros(3 * d)), nn.Parameter(torch.zeros(d))
        self.up_bias = nn.Parameter(torch.zeros(settings.hidden))
        self.down_bias = nn.Parameter(torch.zeros(d))
        bound = settings.kernel**-0.5
        self.memory = nn.Parameter(torch.empty(d, 1, settings.kernel).uniform_(-bound, bound))
        self.low_rank = LowRank(settings) if settings.rank else None
        self.adapter = Adapter(settings) if settings.adapter else None
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, x: Tensor, weights: WeightSet, is_inside: Tensor, is_seen: Tensor) -> Tensor:
        """[N, T, d] -> [N, T, d].

        Args:
            x: the layer's input.
            weights: of its set.
            is_inside: [N, T, 1], 1 for frames that are not padding, else 0; of x's dtype.
            is_seen: [N, 1, T, T] bool, whether a frame (third axis) attends to another (fourth).
        """
        projected = self._linear("qkv", self.attention_norm(x), weights.qkv, self.qkv_bias)
        query, key, value = projected.chunk(3, -1)
        value = value * is_inside
        attended = self._linear("out", self._attend(query, key, value, is_seen), weights.out, self.out_bias)
        x = x + self.dropout(attended) + self._memory(value) * is_inside
        hidden = self._linear("up", self.feed_forward_norm(x), weights.up, self.up_bias).relu()
        x = x + self.dropout(self._linear("down", hidden, weights.down, self.down_bias))
        return x if self.adapter is None else self.adapter(x)

    def _linear(self, name: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = F.linear(x, weight, bias)
        return out if self.low_rank is None else out + self.low_rank.added(name, x)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, is_seen: Tensor) -> Tensor:
        query, key, value = (self._split(one) for one in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=is_seen)
        return attended.transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> Tensor:
        """[N, T, d] -> [N, heads, T, d_k]"""
        return x.view(*x.shape[:2], self.settings.num_heads, -1).transpose(1, 2)

    def _memory(self, value: Tensor) -> Tensor:
        """dropout(V + depthwise(pad(V)))"""
        past = self.settings.kernel // 2 + self.settings.shift
        padded = F.pad(value.transpose(1, 2), (past, self.settings.kernel - 1 - past))
        mixed = F.conv1d(padded, self.memory, groups=self.settings.width).transpose(1, 2)
        kept: Tensor = self.dropout(value + mixed)
        return kept


class SanmEncoder(AcousticModel):
    """Features [N, T, F] -> logits [N, ⌈T/s⌉, C].

    A norm of the input makes features usable that were not normalised.
    """

    def __init__(self, settings: SanmSettings, num_features: int, num_classes: int) -> None:
        super().__init__(settings, num_features, num_classes)
        self.sizes = settings
        stride = settings.subsampling
        taps = 2 * stride + 1
        self.input_norm = FrameNorm(num_features)
        self.first = nn.Conv1d(
            num_features, settings.width, taps, stride=stride, padding=taps // 2, bias=False
        )
        self.norm = FrameNorm(settings.width)
        self.sets = nn.ModuleList(WeightSet(settings) for _ in range(max(settings.sets) + 1))
        self.layers = nn.ModuleList(SanmLayer(settings) for _ in range(settings.num_layers))
        self.output_norm = nn.LayerNorm(settings.width)
        self.output = nn.Linear(settings.width, num_classes)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        is_frame = inside(lengths, features.shape[1])
        features = self.input_norm(features, is_frame)
        hidden = self.first(features.transpose(1, 2)).transpose(1, 2)  # [N, T', d]
        is_inside = inside(self.output_lengths(lengths), hidden.shape[1])
        hidden = self.norm(hidden, is_inside).relu()
        is_seen = self._is_seen(is_inside)
        kept = is_inside[..., None].to(hidden.dtype)
        for layer, index in zip(self.layers, self.sizes.sets, strict=True):
            hidden = layer(hidden, self.sets[index], kept, is_seen)
        logits: Tensor = self.output(self.output_norm(hidden))
        return logits

    def num_uses(self, parameter: str) -> int:
        """How many layers use a parameter, by its name."""
        head, _, rest = parameter.partition(".")
        if head != "sets":
            return 1
        return self.sizes.sets.count(int(rest.partition(".")[0]))

    def _is_seen(self, is_inside: Tensor) -> Tensor:
        """Frames within the context that are not padding; each frame sees itself, so that no row is empty."""
        at = torch.arange(is_inside.shape[1], device=is_inside.device)
        ahead = at[None, :] - at[:, None]  # [T, T], of a frame (first axis) to another
        is_near = torch.ones_like(ahead, dtype=torch.bool)
        if self.sizes.attention_left != ALL:
            is_near = is_near & (ahead >= -self.sizes.attention_left)
        if self.sizes.attention_right != ALL:
            is_near = is_near & (ahead <= self.sizes.attention_right)
        return ((is_near[None] & is_inside[:, None, :]) | (ahead == 0)[None])[:, None]


def _matrix(num_outputs: int, num_inputs: int) -> nn.Parameter:
    bound = num_inputs**-0.5
    return nn.Parameter(torch.empty(num_outputs, num_inputs).uniform_(-bound, bound))
