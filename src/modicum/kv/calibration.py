"""Calibration: measures how many of its tokens each KV head of a model needs, and which, for `HeadProfile`.

The model reads a text twice. A token's score in a KV head is the largest attention weight that it gets from
any query of the second reading in the head's group, times the length of what its value adds to the residual
stream, as a share of the length of that stream at the query. That is the score of KVzip+ (Kim et al. 2025,
arXiv 2505.23416; github.com/NVIDIA/kvpress, kvzip_press.py), which divides by the length of the layer's
normalised input instead. KVzip puts a request to repeat the text in between; without it the shares come out
the same (docs/calibration.md).
What is made of the scores is ours: over all layers, heads and tokens of a text the share f of highest scores
is marked, and a head's share at f is the part of its tokens that is marked, averaged over texts. A ridge
regression per layer from a token's keys and values to log(score + 1e-6) is made on the way.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from modicum.errors import InputError, ModelError
from modicum.float32_products import float32_products
from modicum.kv import head_store
from modicum.kv.attention_override import attention_override
from modicum.kv.fingerprint import weights_digest
from modicum.kv.head_profile import HeadProfile
from modicum.kv.layer_shape import LayerShape
from modicum.kv.observed_attention import observed_attention
from modicum.kv.offload import execution_device
from modicum.kv.output_weight import output_weight
from modicum.kv.precision import without_autocast
from modicum.kv.regression_sums import RegressionSums
from modicum.kv.residual_norms import residual_norms
from modicum.kv.rotary import rotary_of
from modicum.kv.shape import Shape
from modicum.kv.token_regression import features, too_large, why_none
from modicum.kv.turning import Turning
from modicum.kv.unwrap import unwrap
from modicum.kv.value_norms import value_norms
from modicum.progress import Progress, reporting

FRACTIONS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
_SINKS = 4  # first tokens, which every cache keeps: they would take the places of others
_LEAST = 32  # tokens of a text that say anything about a head
_FLOOR = 1e-6  # added to scores before their logarithm
_TINY = 1e-12  # of a vector's length


def calibrate(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str] | None = None,
    *,
    tokens: int = 900,
    most_texts: int = 8,
    fractions: Sequence[float] = FRACTIONS,
    progress: Progress = None,
) -> HeadProfile:
    """Measure a model's head profile and keep it in the user's cache folder, where `calibrated` policies find
    it by the model's weights.

    The profile has a regression of token scores too, for the policy `learned`, where the model's layers can
    have one. Each piece of text is read twice, in one call of the model. Ctrl-C keeps what has been measured;
    the next call with the same model and texts goes on from there.

    Args:
        model: a transformers causal LM.
        tokenizer: its tokenizer.
        texts: to calibrate on; None for `modicum.texts.calibration_texts`: prose of our own and of Python's.
        tokens: of a piece of text; less where the model's context does not hold it twice.
        most_texts: pieces that are read, evenly spaced over all there are.
        fractions: shares of all tokens for which to measure the heads' shares.
        progress: called with (pieces done, pieces in all); True for a bar on stderr.

    Raises:
        InputError: a text that is too short, or is not text.
        ModelError: the model shows no attention, or an attention weight is not a number (names the layer).
    """
    model = unwrap(model)
    length = _length(model, tokens)
    pieces = _pieces(tokenizer, texts, length, most_texts)
    digest = weights_digest(model)
    turning = _turning(model)
    sums = _Sums.begin(model, digest, pieces, tuple(fractions), turning is not None)
    with reporting(progress, len(pieces), "calibrating", "texts") as tell:
        tell(sums.count)
        try:
            for piece in pieces[sums.count :]:
                sums.add(_scores(model, piece, turning))
                tell(1)
        except BaseException:
            sums.keep()
            raise
    profile = sums.profile(model, digest, sum(map(len, pieces)))
    head_store.keep_profile(model, profile)
    sums.drop()
    return profile


def _length(model: PreTrainedModel, tokens: int) -> int:
    """Tokens of a piece such that the context holds it twice."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    length = tokens if not context else min(tokens, context // 2)
    if length < _LEAST:
        raise InputError(
            f"pieces of {length} tokens are too short to calibrate with: give tokens of at least {_LEAST}"
            + (f"; the model's context of {context} has to hold two" if context else "")
        )
    return length


def _pieces(tokenizer: Any, texts: Sequence[str] | None, length: int, most: int) -> list[list[int]]:
    """Token ids of the pieces, each with the tokenizer's special tokens."""
    if texts is None:
        from modicum.texts import calibration_texts

        texts = calibration_texts()
    if isinstance(texts, str) or not texts:
        raise InputError("calibration needs a list of texts, or None for its own")
    bare, written = (list(tokenizer("a", add_special_tokens=on)["input_ids"]) for on in (False, True))
    special = written[: written.index(bare[0])] if bare and bare[0] in written else []  # those in front
    found: list[list[int]] = []
    for number, text in enumerate(texts):
        if not isinstance(text, str) or "\0" in text:
            raise InputError(f"calibration text {number} is not text: give str without null characters")
        plain = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        step = length - len(special)
        found += [special + plain[i : i + step] for i in range(0, max(1, len(plain) - step + 1), step)]
    found = [piece for piece in found if len(piece) >= _LEAST]
    if not found:
        raise InputError(
            f"the calibration texts are too short: give at least one of {_LEAST} tokens, better several of "
            f"{length}"
        )
    if len(found) <= most:
        return found
    return [found[int((i + 0.5) * len(found) / most)] for i in range(most)]


def _turning(model: PreTrainedModel) -> Turning | None:
    """With which the model's keys are turned back; None where it turns none, or it is not known how."""
    try:
        return Turning(rotary_of(model, "", ""), model.dtype)
    except ModelError:
        return None


@dataclass
class _Largest:
    """The largest weight that each token of the text gets from any query of its second reading, and the
    largest contribution that it makes to one.
    """

    first: int
    """Position of the first query of the second reading."""
    length: int
    """Tokens of the text."""
    residuals: Mapping[int, Tensor] = field(default_factory=dict)
    """Layer -> [1, n], see `residual_norms`."""
    value_norms: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> [H, G, length]: L2 norms of values after the output projection, of the layer being read."""
    weights: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> [H, length]."""
    contributions: dict[int, Tensor] = field(default_factory=dict)
    """The same, of the layers of which residuals and lengths are known."""

    @property
    def scores(self) -> dict[int, Tensor]:
        """Contributions where all layers have them: they and weights do not compare."""
        return self.contributions if self.contributions.keys() == self.weights.keys() else self.weights

    def skip(self, layer: int) -> None:
        self.value_norms.pop(layer, None)

    def observe(self, layer: int, weights: Tensor, first: int) -> None:
        start = max(0, self.first - first)
        seen = weights[:, :, start:, : self.length]
        _raise_to(self.weights, layer, seen.amax((1, 2)))
        residual, norms = self.residuals.get(layer), self.value_norms.get(layer)
        if residual is None or norms is None:
            return
        asking = residual[0, first + start : first + weights.shape[2], None].clamp_min(_TINY).to(seen.device)
        _raise_to(self.contributions, layer, (seen * norms[:, :, None] / asking).amax((1, 2)))


def _raise_to(known: dict[int, Tensor], layer: int, found: Tensor) -> None:
    """Let no entry of a layer's be below what was found."""
    before = known.get(layer)
    known[layer] = found if before is None else torch.maximum(before, found)


@dataclass
class _Reading:
    """What a text says of one layer, its first tokens left out."""

    scores: Tensor
    """[KV heads, tokens]"""
    x: Tensor | None
    """[tokens, F] `features`, on the model's device; None where the layer has no regression."""


def _scores(model: PreTrainedModel, piece: list[int], turning: Turning | None) -> list[_Reading | None]:
    """Per layer; None for a layer without full attention."""
    shapes, length = Shape.of(model).layers, len(piece)
    x: dict[int, Tensor] = {}
    device = execution_device(model)
    # Without its first token the second time: most often a special one, which never stands in a text.
    ids = torch.tensor([piece + piece[1:]], device=device)
    scorable = (
        set() if too_large(shapes) else {i for i, s in enumerate(shapes) if s.is_full and not why_none(s)}
    )
    positions = torch.arange(length, device=device)[None]

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = getattr(module, "layer_idx", None)
        if layer is not None and shapes[layer].is_full:
            with suppress(ModelError):  # there is no projection that is a plain matrix
                weight = output_weight(module, shapes[layer], value.device, "calibration")
                largest.value_norms[layer] = value_norms(value[0, :, :length], weight)
        if layer in scorable:
            first = key[:, :, :length].to(torch.promote_types(key.dtype, torch.float32))
            first = first if turning is None else turning.back(first, positions.to(key.device))
            x[layer] = features(first, value[:, :, :length].to(first.dtype))[0, _SINKS:]
        done = observed_attention(module, query, key, value, *args, observer=largest, **kwargs)
        largest.value_norms.clear()
        return done

    with (
        residual_norms(model) as residuals,
        attention_override(model, attention, "calibrated"),
        torch.no_grad(),
        without_autocast(device),
        float32_products(model.dtype),
    ):
        largest = _Largest(length, length, residuals)
        model.base_model(input_ids=ids, use_cache=False)
    found: list[_Reading | None] = []
    all_scores = largest.scores
    for index, shape in enumerate(shapes):
        scores = all_scores.get(index) if shape.is_full else None
        if scores is None:
            found.append(None)
            continue
        if not bool(scores.isfinite().all()):
            raise ModelError(
                f"layer {index} has attention weights that are no numbers: the model's weights or its "
                "dtype are broken; load it in float32 and try again"
            )
        # Heads that read one latent share one KV head.
        scores = torch.unflatten(scores, 0, (shape.kv_heads, -1)).amax(1)[:, _SINKS:].cpu()
        found.append(_Reading(scores, x.get(index)))
    if not any(found):
        raise ModelError(f"{type(model).__name__} showed no attention to calibrate")
    return found


class _Sums:
    """Shares, and what regressions are made of, added up over texts; kept in a file when interrupted."""

    def __init__(
        self,
        layers: Sequence[LayerShape],
        fractions: tuple[float, ...],
        path: Path | None,
        is_unrotated: bool,
    ) -> None:
        self.heads = [layer.kv_heads for layer in layers]
        self.skipped = [i for i, layer in enumerate(layers) if not layer.is_full]
        self.fractions, self.path, self.is_unrotated = fractions, path, is_unrotated
        self.count = 0
        self.total = torch.zeros(len(fractions), sum(self.heads), dtype=torch.float64)
        self.regression = RegressionSums(layers)
        self._is_whole = True  # but while a text is added

    @classmethod
    def begin(
        cls,
        model: PreTrainedModel,
        digest: str,
        pieces: list[list[int]],
        fractions: tuple[float, ...],
        is_unrotated: bool,
    ) -> _Sums:
        """From nothing, or from what an interrupted calibration with the same texts has kept."""
        path = None
        if digest:
            what = json.dumps([digest, pieces, fractions, is_unrotated]).encode()
            name = f"{digest}-{hashlib.sha256(what).hexdigest()[:16]}.part.safetensors"
            path = head_store.folder() / name
        made = cls(Shape.of(model).layers, fractions, path, is_unrotated)
        if path is not None and path.is_file():
            with suppress(SafetensorError, OSError, KeyError, ValueError):
                kept = load_file(path)
                if kept["total"].shape == made.total.shape:
                    made.regression.load(kept)
                    made.total, made.count = kept["total"], int(kept["count"])
        return made

    def add(self, readings: list[_Reading | None]) -> None:
        """Of one text."""
        self._is_whole = False
        scores = [None if reading is None else reading.scores for reading in readings]
        joined = torch.cat([s.flatten() for s in scores if s is not None])
        ordered = joined.sort().values
        for f, fraction in enumerate(self.fractions):
            threshold = ordered[min(len(ordered) - 1, math.floor((1 - fraction) * len(ordered)))]
            parts = [
                torch.zeros(n, dtype=torch.float64) if s is None else (s >= threshold).double().mean(-1)
                for n, s in zip(self.heads, scores, strict=True)
            ]
            self.total[f] += torch.cat(parts)
        for layer, reading in enumerate(readings):
            if reading is not None and reading.x is not None:
                self.regression.add(layer, reading.x, (reading.scores.double().T + _FLOOR).log())
        self.count += 1
        self._is_whole = True

    def keep(self) -> None:
        """Write what there is, for a later run to go on from; without it that one begins anew."""
        if self.path is None or not self.count or not self._is_whole:
            return
        with suppress(OSError, SafetensorError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            sums = {"total": self.total, "count": torch.tensor(self.count), **self.regression.tensors}
            save_file(sums, self.path)

    def drop(self) -> None:
        """The file is no longer needed."""
        if self.path is not None:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)

    def profile(self, model: PreTrainedModel, digest: str, tokens: int) -> HeadProfile:
        """The means."""
        rows = torch.split((self.total / self.count).clamp(0, 1), self.heads, dim=1)
        config = model.config.get_text_config(decoder=True)
        return HeadProfile(
            fractions=self.fractions,
            shares=tuple(tuple(tuple(row[f].tolist()) for row in rows) for f in range(len(self.fractions))),
            skipped=tuple(self.skipped),
            weights=digest,
            model=Path(str(getattr(config, "_name_or_path", "") or model.name_or_path)).name,
            model_type=config.model_type,
            texts=self.count,
            tokens=tokens,
            regression=self.regression.solve(self.is_unrotated),
        )
