"""Kept positions and retained attention mass, against loops over transformers' eager weights in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import modicum
from modicum.errors import BudgetError, InputError, SnapshotError
from modicum.report.maps import column_shares
from modicum.report.trace import Trace, trace
from modicum.report.traces import load_traces, save_traces
from tests import zoo
from tests.bounds import LAMBDA, exactly, gamma, network_error
from tests.driver import feed

ASKED = 5
CONTEXT = " ".join(map(str, zoo.tokens(1, 90, seed=4)[0].tolist()))
QUESTION = " ".join(map(str, zoo.tokens(1, ASKED, seed=5)[0].tolist()))


class Numbers:
    """A tokenizer whose words are token ids."""

    eos_token_id = bos_token_id = pad_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def ids(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def traced(model: Any, policy: str = "snapkv(window=8)", budget: Any = 24, **more: Any) -> Trace:
    settings: dict[str, Any] = {"chunk": 32, "recent": 8, "question": QUESTION} | more
    return trace(model, Numbers(), CONTEXT, policy=policy, budget=budget, **settings)


def reference_mass(name: str, kept: tuple[Any, ...], question: str | None, rows: int) -> list[list[float]]:
    """[layers][query heads], by loops over single weights."""
    model = zoo.build(name, torch.float64, "eager")
    whole = ids(CONTEXT) + (ids(question) if question else [])
    n, m = len(ids(CONTEXT)), len(whole)
    with torch.no_grad():
        weights = model(torch.tensor([whole]), output_attentions=True).attentions
    shares = []
    for layer, mask in enumerate(kept):
        heads = weights[layer].shape[1]
        group = heads // mask.shape[0]
        shares.append([])
        for head in range(heads):
            on_kept = on_context = 0.0
            for i in range(m - rows, m):
                for j in range(min(i + 1, n)):
                    weight = float(weights[layer][0, head, i, j])
                    on_context += weight
                    on_kept += weight * bool(mask[head // group, j])
            shares[-1].append(on_kept / on_context)
    return shares


@pytest.mark.parametrize("name", ["llama", "llama-mqa", "gemma2", "gpt-neox"])
@pytest.mark.parametrize("question", [QUESTION, None])
def test_mass_is_the_share_of_the_full_caches_weights(name: str, question: str | None) -> None:
    made = traced(zoo.build(name), question=question)
    assert made.tokens == len(ids(CONTEXT))
    assert (made.rows, made.asked) == ((ASKED, True) if question else (32, False))
    wanted = reference_mass(name, made.kept, question, made.rows)
    # A share of attention weights is as inexact as what they are made of.
    bound = 2 * LAMBDA * network_error(zoo.shared(name), made.tokens + ASKED)
    ruled = 0
    for layer, mass in enumerate(made.mass):
        if np.isnan(mass).any():
            assert (name, layer) == ("gemma2", 0), "only a sliding-window layer has no mass"
            assert np.isnan(mass).all()
            continue
        ruled += 1
        assert mass.tolist() == pytest.approx(wanted[layer], abs=bound)
        assert max(wanted[layer]) < 0.999, "nothing was lost: the test would show nothing"
    assert ruled >= 2


def test_kept_positions_are_the_caches() -> None:
    model = zoo.build("llama")
    made = traced(model, "adakv+snapkv(window=8)")
    cache = modicum.BudgetCache(model, "adakv+snapkv(window=8)", 24, chunk=32, recent=8)
    feed(model, cache, torch.tensor([ids(CONTEXT)]))
    for layer, kept in enumerate(made.kept):
        for head, places in enumerate(cache.positions(layer)[0].tolist()):
            assert np.flatnonzero(kept[head]).tolist() == sorted(p for p in places if p >= 0)
    total = sum(int(k.sum()) for k in made.kept)
    assert made.kept_share == exactly(total / sum(k.size for k in made.kept))
    assert made.mean_mass == pytest.approx(float(np.mean(made.mass)), rel=gamma(99, torch.float32))


def test_the_whole_cache_keeps_all_attention() -> None:
    made = traced(zoo.build("llama"), "full", "full")
    assert all(k.all() for k in made.kept)
    assert np.concatenate(made.mass).tolist() == pytest.approx([1.0] * 8, rel=gamma(2 * 95, torch.float32))
    assert (made.budget, made.kept_share) == ("full", 1.0)


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama")
    whole = traced(model)
    monkeypatch.setattr("modicum.report.trace._TILE_BYTES", 1)
    for a, b in zip(traced(model).mass, whole.mass, strict=True):
        # The same logits, in products of other shapes: as inexact as those of one layer.
        bound = 2 * LAMBDA * network_error(zoo.shared("llama"), whole.tokens + ASKED)
        assert a.tolist() == pytest.approx(b.tolist(), abs=bound)


def test_a_share_is_of_the_context_and_one_shot_is_one_chunk() -> None:
    model = zoo.build("llama")
    made = traced(model, "keydiff", "40%")
    assert {int(k.sum(1).max()) for k in made.kept} == {int(0.4 * 90)}
    shot = traced(model, "keydiff", "40%", chunk=None)
    chunked = traced(model, "keydiff", "40%", chunk=90)
    assert all((a == b).all() for a, b in zip(shot.kept, chunked.kept, strict=True))


def test_the_model_is_left_as_it_was() -> None:
    model = zoo.build("llama").train()
    modicum.BudgetCache(model, "keydiff", 64)  # attaches
    before = model.config._attn_implementation
    traced(model)
    assert model.config._attn_implementation == before
    assert model.training
    with pytest.raises(InputError, match="question has no tokens"):
        traced(model, question="")
    with pytest.raises(BudgetError, match="too small"):
        traced(model, budget=3)
    assert model.config._attn_implementation == before


def test_traces_are_read_as_they_were_written(tmp_path: Path) -> None:
    model = zoo.build("gemma2")
    made = [traced(model), replace(traced(model, "keydiff", "40%"), task="niah", sample=3)]
    save_traces(tmp_path / "t.npz", made)
    again = load_traces(tmp_path / "t.npz")
    assert [t.key for t in again] == [t.key for t in made]
    for a, b in zip(made, again, strict=True):
        assert (a.tokens, a.rows, a.asked) == (b.tokens, b.rows, b.asked)
        assert all((x == y).all() and x.dtype == y.dtype for x, y in zip(a.kept, b.kept, strict=True))
        for x, y in zip(a.mass, b.mass, strict=True):
            np.testing.assert_array_equal(x, y)
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]


def test_files_that_hold_no_traces_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    with pytest.raises(SnapshotError, match="cannot read traces"):
        load_traces(path)
    save_traces(path, [traced(zoo.build("llama"))])
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no archive at all"):
        path.write_bytes(damaged)
        with pytest.raises(SnapshotError, match="delete it and trace again"):
            load_traces(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(SnapshotError, match="holds no traces"):
        load_traces(path)
    text = b'{"format": "modicum traces", "version": 99, "traces": []}'
    np.savez(path, header=np.frombuffer(text, np.uint8))
    with pytest.raises(SnapshotError, match=r"version 99, .* update"):
        load_traces(path)
    with pytest.raises(SnapshotError, match="cannot write"):
        save_traces(tmp_path / "nowhere" / "t.npz", [])


@pytest.mark.parametrize("n", [1, 7, 480, 481, 1000, 1441])
def test_columns_of_a_map_are_shares_of_their_positions(n: int) -> None:
    kept = np.random.default_rng(n).random((2, n)) < 0.4
    shares = column_shares(kept)
    width = min(480, n)
    assert shares.shape == (2, width)
    for column in range(width):
        places = [j for j in range(n) if j * width // n == column]
        for head in range(2):
            assert math.isclose(shares[head, column], sum(kept[head, places]) / len(places))
