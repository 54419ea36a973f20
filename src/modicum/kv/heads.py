"""Head scores: which heads look back at earlier copies of what they read.

RazorAttention's probe (arXiv 2407.15891): a text of K random tokens is repeated. A head that finds, at each
token, the same token one copy earlier *echoes*; one that finds the token after it is an *induction* head.
Heads that do neither lose little when they only stream.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modicum.errors import InputError, ModelError, SnapshotError
from modicum.kv.attention_override import attention_override
from modicum.kv.observed_attention import observed_attention
from modicum.kv.offload import execution_device
from modicum.kv.precision import without_autocast
from modicum.kv.shape import Shape
from modicum.kv.unwrap import unwrap
from modicum.progress import Progress, reporting
from modicum.whole_file import write_json

_FORMAT, _VERSION = "modicum head scores", 1

Table = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class HeadScores:
    """What the probe measured: mean attention weights per layer and KV head, from 0 to 1.

    Raises:
        InputError: tables of unequal shape, or a score that is not a finite number.
    """

    echo: Table
    """[layers][KV heads]: weight on the same token one copy earlier."""
    induction: Table
    """[layers][KV heads]: weight on the token after it."""
    skipped: tuple[int, ...] = ()
    """Layers without full attention; their scores are 0 and mean nothing."""
    model: str = ""
    model_type: str = ""
    tokens: int = 0
    """K, the length of one copy."""
    copies: int = 0
    seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for key in ("echo", "induction"):
            rows = getattr(self, key)
            rows = rows.tolist() if isinstance(rows, Tensor) else rows
            object.__setattr__(self, key, tuple(tuple(float(x) for x in row) for row in rows))
        for key in ("skipped", "seeds"):
            object.__setattr__(self, key, tuple(int(i) for i in getattr(self, key)))
        if [len(row) for row in self.echo] != [len(row) for row in self.induction]:
            raise InputError("head scores: the tables of echo and induction differ in shape")
        if not all(math.isfinite(x) for table in (self.echo, self.induction) for row in table for x in row):
            raise InputError("head scores: not every score is a finite number")

    @property
    def heads(self) -> tuple[int, ...]:
        """KV heads of each layer."""
        return tuple(len(row) for row in self.echo)

    def check(self, heads: Sequence[int]) -> None:
        """Raise unless the scores are of a model with so many KV heads in each layer."""
        if self.heads != tuple(heads):
            raise SnapshotError(
                f"head scores of {self.model or 'a model'} with {list(self.heads)} KV heads per "
                f"layer do not fit a model with {list(heads)}: probe this model"
            )

    def save(self, path: str | Path) -> None:
        """Write the scores as JSON, whole or not at all."""
        write_json(path, {"format": _FORMAT, "version": _VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read saved scores.

        Raises:
            SnapshotError: the file is missing, truncated, foreign, or of a newer format.
        """
        remedy = "write it anew with HeadScores.save"
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise SnapshotError(f"cannot read head scores from {path}: {error.strerror}; {remedy}") from error
        except ValueError as error:
            raise SnapshotError(f"{path} is truncated or no JSON at all ({error}): {remedy}") from error
        if not isinstance(data, dict) or data.pop("format", None) != _FORMAT:
            raise SnapshotError(f"{path} does not hold head scores: {remedy}")
        version = data.pop("version", None)
        if version != _VERSION:
            raise SnapshotError(
                f"{path} has format version {version!r}, this modicum reads {_VERSION}: update modicum, or "
                f"{remedy}"
            )
        try:
            return cls(**data)
        except (InputError, TypeError, ValueError) as error:
            raise SnapshotError(f"{path} is damaged ({error}): {remedy}") from error


def probe(
    model: PreTrainedModel,
    *,
    tokens: int = 400,
    copies: int = 4,
    seeds: Sequence[int] = (0,),
    exclude: Collection[int] = (),
    progress: Progress = None,
) -> HeadScores:
    """Measure a model's heads: one forward per seed over `copies` copies of K random tokens.

    K is `tokens`, or what of it fits the model's context. BOS goes first where the configuration has one.
    Weights are read at query positions beyond the first copy, to the nearest earlier copy only: mean over
    positions and seeds, largest of each group of query heads. The attention of the probe's own calls runs in
    tiles of queries (no n × n map); calls of other threads are not touched. A model in training mode is in
    evaluation mode meanwhile.

    The paper's K is 2,500. The cost of a longer text grows with its square, and the heads that are chosen by
    the default are those of longer texts and of more seeds, but for one of 14 (docs/experiments/papers.md).

    exclude: token ids not to draw besides BOS, EOS and padding, such as `tokenizer.all_special_ids`.
    progress: called with (layers read, layers in all); True for a bar on stderr.

    Raises:
        InputError: fewer than two copies or tokens, no seeds, or a context too short for them.
        ModelError: the model's attention does not go through transformers' attention interface.
    """
    model = unwrap(model)
    config = model.config.get_text_config(decoder=True)
    shapes = Shape.of(model).layers
    bos = config.bos_token_id
    if not isinstance(bos, int) or not 0 <= bos < config.vocab_size:
        bos = None
    length = _copy_length(config, tokens, copies, 0 if bos is None else 1)
    if not seeds:
        raise InputError("the probe needs at least one seed, such as seeds=(0,)")
    allowed = torch.tensor(sorted(set(range(config.vocab_size)) - _special(model, config) - set(exclude)))
    if not len(allowed):
        raise InputError(f"of {config.vocab_size} token ids none is left to draw: exclude fewer")
    reading = _Reading(length, length + (bos is not None))
    device = execution_device(model)
    attention = partial(observed_attention, observer=reading)
    num_layers = sum(shape.kv_heads > 0 for shape in shapes)
    with (
        reporting(progress, len(seeds) * num_layers, "probing heads", "layers") as reading.tell,
        attention_override(model, attention, "probed"),
        torch.no_grad(),
        without_autocast(device),
    ):
        for seed in seeds:
            draw = torch.randint(len(allowed), (length,), generator=torch.Generator().manual_seed(seed))
            ids = allowed[draw].repeat(copies)
            ids = ids if bos is None else torch.cat([torch.tensor([bos]), ids])
            # The body without its head: no logits over the vocabulary.
            model.base_model(input_ids=ids[None].to(device), use_cache=False)
    if not reading.sums and not reading.skipped:
        raise ModelError(
            f"{type(model).__name__} showed the probe no attention: it has no layers it can read"
        )
    layers = range(len(shapes))
    count = (copies - 1) * length * len(seeds)
    means = {  # {layer: [2, H]}; the heads of a latent layer share one KV head
        i: (sums / count).amax(-1).cpu().reshape(2, shapes[i].kv_heads, -1).amax(-1)
        for i, sums in reading.sums.items()
        if i < len(shapes) and shapes[i].is_full
    }
    blanks = [torch.zeros(2, shape.kv_heads) for shape in shapes]
    name = str(getattr(config, "_name_or_path", "") or model.name_or_path)
    return HeadScores(
        echo=tuple(tuple(means.get(i, blanks[i])[0].tolist()) for i in layers),
        induction=tuple(tuple(means.get(i, blanks[i])[1].tolist()) for i in layers),
        skipped=tuple(i for i in layers if i not in means),
        model=os.path.basename(name) if os.path.isabs(name) else name,
        model_type=config.model_type,
        tokens=length,
        copies=copies,
        seeds=tuple(seeds),
    )


def _copy_length(config: Any, tokens: int, copies: int, ahead: int) -> int:
    if copies < 2 or tokens < 2:
        raise InputError(f"the probe got {copies} copies of {tokens} tokens: it needs at least 2 of each")
    context = getattr(config, "max_position_embeddings", None)
    length = tokens if not context else min(tokens, (context - ahead) // copies)
    if length < 2:
        raise InputError(
            f"a context of {context} tokens does not hold {copies} copies of 2: use fewer copies"
        )
    return length


def _special(model: PreTrainedModel, config: Any) -> set[int]:
    found: set[int] = set()
    for source in (config, getattr(model, "generation_config", None)):
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(source, key, None)
            found.update([value] if isinstance(value, int) else value or [])
    return found


@dataclass
class _Reading:
    """What one probe has read so far."""

    copy: int
    """K: how far back the same token is."""
    first: int
    """First position of the second copy."""
    sums: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> [2, H, G]: sums of echo and induction weights."""
    skipped: set[int] = field(default_factory=set)
    tell: Callable[[int], None] = lambda more: None
    """Called with 1 at each layer."""
    at: int = -1
    """The layer being read."""

    def skip(self, layer: int) -> None:
        self.skipped.add(layer)
        self._reach(layer)

    def observe(self, layer: int, weights: Tensor, first: int) -> None:
        """Add each query's two weights past the first copy; weights [H, G, t, n] of queries from `first`."""
        rows = torch.arange(weights.shape[2], device=weights.device)[max(0, self.first - first) :]
        same = rows + first - self.copy
        both = torch.stack([weights[:, :, rows, same], weights[:, :, rows, same + 1]]).sum(-1)
        self.sums[layer] = self.sums.get(layer, 0) + both
        self._reach(layer)

    def _reach(self, layer: int) -> None:
        if layer != self.at:  # an attention is shown in several tiles
            self.at = layer
            self.tell(1)
