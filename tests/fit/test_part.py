"""Bytes as a run holds them."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import nn

import modicum
from modicum.fit.part import held_nbytes, model_nbytes, parts_of
from modicum.weights import save
from modicum.weights.blocks import blocks_of
from modicum.weights.packed import PackedLinear, pack
from tests.fit.fitting import tiny


@pytest.mark.parametrize("width", [7, 8, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_holds_what_is_counted(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mask = torch.rand(5, width) < 0.4
    layer = PackedLinear(pack(mask), torch.randn(int(mask.sum()), dtype=dtype), width, None)
    held = sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers())) + 8 * (5 + 1)
    assert held_nbytes(5, width, int(mask.sum()), dtype.itemsize) == held == model_nbytes(layer)


def test_a_tied_weight_counts_once() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    assert model_nbytes(nn.Sequential(first, second)) == first.weight.nbytes


def test_parts_hold_every_weight_of_the_blocks_once() -> None:
    model, _ = tiny()
    blocks = blocks_of(model)
    parts = parts_of(blocks)
    assert [part.name for part in parts[:3]] == ["0.attention", "0.mlp", "1.attention"]
    names = [matrix.name for part in parts for matrix in part.matrices]
    assert sorted(names) == sorted(matrix.name for block in blocks for matrix in block.matrices)


def test_a_model_that_runs_packed_has_no_dense_copy(tmp_path: Path) -> None:
    model, tokenizer = tiny()
    text = modicum.sample_text()
    report = modicum.prune(
        model, text, tokenizer=tokenizer, sparsity=0.5, refine=None, sequences=2, length=32
    )
    save(report, model, tokenizer, tmp_path / "pruned")
    dense = model_nbytes(model)
    pruned = sum(mask.numel() * 4 for mask in report.masks.values())
    loaded, _ = modicum.load(tmp_path / "pruned", weights="packed")
    gc.collect()
    held = sum(
        held_nbytes(*mask.shape, int(mask.sum()), next(iter(loaded.parameters())).element_size())
        for mask in report.masks.values()
    )
    assert model_nbytes(loaded) == dense - pruned + held
    assert held < 0.6 * pruned
