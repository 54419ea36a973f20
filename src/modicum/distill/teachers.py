"""Teachers: language models by their names, checked against a student and opened as an ensemble."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modicum.distill import sequences
from modicum.distill.ensemble import Classifier, Ensemble
from modicum.distill.model_digest import model_digest
from modicum.errors import ModelError
from modicum.loading import load

_BATCH = 8
"""Questions that are answered at a time."""


@dataclass(frozen=True)
class Teachers:
    """Checked teachers.

    Attributes:
        digests: of all weights of each one (`model_digest`).
        num_classes: tokens of the vocabulary, as many as a model gives logits.
        answer: greedy answers of the first one.
        ensemble: their mean; for ids [n, T] it gives probabilities [n, T - 1, C], of each token but the
        first.
    """

    digests: tuple[str, ...]
    num_classes: int
    answer: sequences.Answer
    ensemble: Ensemble


def open_teachers(
    names: Sequence[str], tokenizer: Any, ids: Tensor, *, temperature: float = 1.0, device: str = "auto"
) -> Teachers:
    """Load each teacher once to check it. A single one stays in memory; of several, one at a time.

    Args:
        names: as `modicum.load` takes them.
        tokenizer: the student's.
        ids: [n, T] the tokens that will be read; some of them are decoded and encoded again by each teacher.

    Raises:
        ModelError: a teacher cannot be loaded, or has another vocabulary than the student or another teacher.
    """
    digests, widths = [], []
    kept: list[Any] = []
    for name in names:
        # In a call of its own, so that one model is gone before the next is loaded.
        digest, width, model = _open(name, tokenizer, ids, device)
        digests.append(digest)
        widths.append(width)
        if width != widths[0]:
            raise ModelError(
                f"teacher {names[0]} gives logits for {widths[0]:,} tokens, {name} for {width:,}: give "
                "teachers of one vocabulary"
            )
        if len(names) == 1:
            kept.append(model)
        del model
    loaders: list[Callable[[], Classifier]] = [_loader(name, device) for name in names]
    if kept:
        loaders = [lambda: _reader(kept[0])]

    def answer(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        first = kept[0] if kept else load(names[0], device=device)[0]
        return greedy_answers(first, tokenizer, prompts, max_new_tokens)

    return Teachers(tuple(digests), widths[0], answer, Ensemble(loaders, temperature))


def _open(name: str, tokenizer: Any, ids: Tensor, device: str) -> tuple[str, int, Any]:
    """A checked teacher: the digest of its weights, how many logits it gives, and its model."""
    model, own = load(name, device=device)
    _check_vocabulary(name, own, tokenizer, ids)
    digest = model_digest(model)
    if not digest:
        raise ModelError(
            f"the weights of {name} cannot be read here, so that its targets could not be told from "
            "another teacher's: give a model whose weights are in memory"
        )
    return digest, _width(model), model


def _width(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def _loader(name: str, device: str) -> Callable[[], Classifier]:
    return lambda: _reader(load(name, device=device)[0])


def _reader(model: Any) -> Classifier:
    def read(ids: Tensor) -> Tensor:
        logits: Tensor = model(ids.to(model.device), use_cache=False).logits
        return logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))

    return read


@torch.no_grad()
def greedy_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """A model's greedy answers to prompts of tokens, each with its end token if it has one."""
    answers: list[list[int]] = []
    for start in range(0, len(prompts), _BATCH):
        some = [list(prompt) for prompt in prompts[start : start + _BATCH]]
        padded = tokenizer.pad({"input_ids": some}, return_tensors="pt")
        given = {name: padded[name].to(model.device) for name in ("input_ids", "attention_mask")}
        out = model.generate(**given, max_new_tokens=max_new_tokens, do_sample=False)
        for row in out[:, given["input_ids"].shape[1] :].tolist():
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            answers.append(row[:end])
    return answers


def _check_vocabulary(name: str, teacher: Any, student: Any, ids: Tensor) -> None:
    remedy = "give a teacher with the student's tokenizer"
    theirs, ours = teacher.get_vocab(), student.get_vocab()
    if theirs != ours:
        differing = sorted(
            token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token)
        )
        raise ModelError(
            f"teacher {name} has {len(theirs):,} tokens and the student {len(ours):,}, and "
            f"{len(differing):,} of them differ, such as {differing[0]!r}: {remedy}"
        )
    # The same tokens may be put together by other rules.
    for row in ids[:: max(1, len(ids) // 8)]:
        text = student.decode(row)
        found, expected = (
            list(t(text, add_special_tokens=False, verbose=False)["input_ids"]) for t in (teacher, student)
        )
        if found != expected:
            raise ModelError(
                f"teacher {name} has the student's tokens and divides text into them otherwise: {remedy}"
            )


def about(teachers: Teachers, ids: Tensor) -> dict[str, str]:
    """What tells a recording of these teachers on these tokens from any other."""
    return {"teacher": "+".join(teachers.digests), "text": sequences.digest(ids)}
