"""The guide: where answers' tokens stood before, and the loss of heads that do not look there."""

from __future__ import annotations

import math
import random

import pytest
import torch

from modicum.reference.documents import Writer
from modicum.reference.guide import looks, sources
from modicum.reference.train import build, hidden_states
from tests.bounds import LAMBDA, assert_within, exactly, network_error
from tests.reference.tiny import TINY


def test_guided_heads_are_the_models_own() -> None:
    model = build(TINY)
    ids = torch.randint(0, 512, (2, 20))
    _, guide = hidden_states(model, ids, torch.arange(20)[None].expand(2, -1), ((0, 3), (1, 0), (1, 2)))
    assert guide is not None
    query, key = guide
    future = torch.ones(20, 20).triu(1).bool()
    ours = (query @ key.transpose(-1, -2) * 8**-0.5).masked_fill(future, -torch.inf).softmax(-1)
    model.set_attn_implementation("eager")  # only after: without a mask it would look ahead
    with torch.no_grad():
        maps = model(ids, output_attentions=True).attentions
    wanted = torch.stack([maps[0][:, 3], maps[1][:, 0], maps[1][:, 2]], 1)
    assert_within(ours, wanted, 2 * LAMBDA * network_error(model, 20))  # weights, at most 1


def test_sources_are_where_the_answers_words_stood() -> None:
    #      0  1  2  3  4  5  6  7  8  9 10 11 12 13 14
    ids = [9, 1, 2, 3, 4, 8, 1, 2, 5, 6, 7, 1, 2, 5, 6]
    marks = [0] * 11 + [2, 1, 2, 1]
    assert sources(ids, marks) == [(11, [6]), (12, [7]), (13, [8]), (14, [9])]
    # Longer in one place than in the other; then a new piece; two tokens are no piece.
    ids = [1, 2, 3, 0, 1, 2, 3, 4, 0, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 1, 2]
    marks = [0] * 13 + [1] * 9
    found = sources(ids, marks)
    assert found == [(13 + i, [4 + i]) for i in range(4)] + [(17 + i, [9 + i]) for i in range(3)]
    assert sources([1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3], [0] * 8 + [1] * 3)[0] == (8, [0, 4])


@pytest.mark.parametrize("kind", ["exact", "keys", "needle", "copy"])
def test_sources_hold_the_token(writer: Writer, kind: str) -> None:
    told = answers = 0
    for seed in range(6):
        made = writer.draw(kind, 512, random.Random(seed))
        found = sources(made.ids, made.marks)
        told, answers = told + len(found), answers + sum(mark > 0 for mark in made.marks)
        for at, places in found:
            assert places
            assert all(place < at and made.ids[place] == made.ids[at] for place in places)
    assert told > 0.5 * answers > 0


def test_looks_against_loops() -> None:
    generator = torch.Generator().manual_seed(3)
    query, key = torch.randn(2, 2, 3, 12, 8, generator=generator).double()
    told = [[(4, [1, 2]), (9, [6]), (13, [2])], [(7, [0])]]  # 13: after the last query
    weights = [[0.1 * i for i in range(14)], [1.0] * 14]
    total, whole = looks(query, key, told, weights)
    expected = norm = 0.0
    for row, places in enumerate(told):
        for at, before in places:
            if at > 12:
                continue
            norm += weights[row][at]
            for head in range(3):
                scores = [
                    math.exp(
                        sum(
                            float(q * k)
                            for q, k in zip(query[row, head, at - 1], key[row, head, n], strict=True)
                        )
                        / 8**0.5
                    )
                    for n in range(at)
                ]
                missed = -math.log(sum(scores[n] for n in before) / sum(scores))
                expected += weights[row][at] * missed / 3
    assert float(total) == exactly(expected, 2000)
    assert whole == exactly(norm)
