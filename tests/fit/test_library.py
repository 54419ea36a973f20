"""The library: variants in isolation, kept and found again."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modicum.errors import InputError, ModelError
from modicum.fit import assembly
from modicum.fit.fitter import Fitter
from modicum.fit.library import noise_to_signal
from modicum.fit.probe import Errors
from modicum.weights.pattern import Groups
from tests.fit.fitting import QUICK, fitter, tiny

pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Fitter:
    found = fitter(tmp_path_factory.mktemp("library"))
    found.build()
    return found


def test_noise_to_signal_is_that_of_plain_loops() -> None:
    torch.manual_seed(0)
    whole = [torch.randn(1, 5, 3, dtype=torch.float64) for _ in range(2)]
    whole[0][..., 2] = whole[1][..., 2] = 1.5  # does not vary: left out
    changed = [x + 0.1 * torch.randn_like(x) for x in whole]
    ratios = []
    for channel in range(2):
        values = [float(x[0, t, channel]) for x in whole for t in range(5)]
        noise = [float((x - y)[0, t, channel]) for x, y in zip(whole, changed, strict=True) for t in range(5)]
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / len(values)
        ratios.append(sum(n * n for n in noise) / len(noise) / variance)
    # A few dozen operations in float64 on numbers of order 1.
    assert noise_to_signal(whole, changed) == pytest.approx(sum(ratios) / 2, rel=1e-12)


def test_the_reference_is_left_as_it_was(made: Fitter) -> None:
    fresh, _ = tiny()
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, made.model.state_dict()[name]), name


def test_every_part_has_every_option_and_dense_has_no_error(made: Fitter) -> None:
    variants = made.library.variants
    assert len(variants) == len(made.library.parts) * 3
    for (_, option), variant in variants.items():
        if option == "dense":
            assert (variant.errors.text, variant.errors.nsr) == (0.0, 0.0)
        else:
            assert variant.errors.nsr > 0
            assert variant.nbytes < variants[variant.part, "dense"].nbytes


def test_variants_are_put_with_their_masks(made: Fitter) -> None:
    options = {part.name: "dense" for part in made.library.parts} | {"1.mlp": "2:4"}
    part = next(part for part in made.library.parts if part.name == "1.mlp")
    before = [matrix.weight.clone() for matrix in part.matrices]
    with made.library.assembled(options):
        for matrix in part.matrices:
            assert Groups(2, 4).follows(matrix.weight != 0)
    for matrix, weight in zip(part.matrices, before, strict=True):
        assert torch.equal(matrix.weight, weight)


def test_a_layer_that_is_lost_is_made_again_alike(made: Fitter) -> None:
    path = made.library.folder / "layer-0002.safetensors"
    # Copies: what is mapped into memory goes with the file.
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    variants = dict(made.library.variants)
    path.write_bytes(b"cut")
    again = fitter(made.library.folder)
    again.build()
    assert again.library.variants == variants
    for name, value in load_file(path).items():
        assert torch.equal(value, tensors[name]), name


def test_rows_cut_by_a_kill_are_measured_again(made: Fitter) -> None:
    path = made.library.folder / "samples.jsonl"
    whole = path.read_text(encoding="utf-8")
    rows = made.library.rows("samples")
    path.write_text(whole[:-20], encoding="utf-8")
    assert len(made.library.rows("samples")) == len(rows) - 1
    with path.open("a", encoding="utf-8") as file:
        file.write('\n5\n[]\n{"text": 1}\n{"name": "x", "more": 1}\n')
    assert len(made.library.rows("samples")) == len(rows) - 1
    again = fitter(made.library.folder)
    again.build()
    assert again.library.rows("samples") == rows


def test_rows_that_cannot_be_kept_or_read_are_one_line(made: Fitter, tmp_path: Path) -> None:
    library = copy.copy(made.library)
    library.folder = tmp_path
    (tmp_path / "cache.jsonl").mkdir()
    with pytest.raises(ModelError, match=r"cannot write .*cache\.jsonl"):
        library.keep("cache", "x", Errors(0.0, 0.0, 1.0))
    with pytest.raises(InputError, match=r"cache\.jsonl cannot be read"):
        library.rows("cache")


def test_the_library_of_another_reference_is_refused(made: Fitter) -> None:
    other, _ = tiny()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(InputError, match="library of another run: its reference is"):
        fitter(made.library.folder, model=other)
    with pytest.raises(InputError, match="method"):
        fitter(made.library.folder, replace(QUICK, method="sparsegpt"))


def test_a_run_that_is_stopped_leaves_the_reference_as_it_was(tmp_path: Path) -> None:
    own = fitter(tmp_path / "own", replace(QUICK, weights=("dense", "50%"), probes=1))
    before = {name: value.clone() for name, value in own.model.state_dict().items()}
    measured = 0

    class Stopped:
        def measure(self, model: Any) -> Errors:
            nonlocal measured
            measured += 1
            if measured == 2:
                raise KeyboardInterrupt
            return Errors(0.1, 0.0, 1.0)

    stopped: Any = Stopped()
    with pytest.raises(KeyboardInterrupt):
        own.library.build(stopped)
    for name, value in own.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_rows_are_of_the_heads_that_they_were_measured_with(made: Fitter, tmp_path: Path) -> None:
    first, second = copy.copy(made.library), copy.copy(made.library)
    first.folder = second.folder = tmp_path
    first.heads, second.heads = "a" * 16, "b" * 16
    for kind in ("cache", "samples"):
        first.keep(kind, "x", Errors(0.25, 0.5, 1.0))
        assert first.rows(kind) == {"x": Errors(0.25, 0.5, 1.0, pytest.approx(math.nan, nan_ok=True))}
        assert second.rows(kind) == {}
        second.keep(kind, "x", Errors(0.5, 0.75, 1.0))
        assert (first.rows(kind)["x"].text, second.rows(kind)["x"].text) == (0.25, 0.5)


def test_in_order_and_from_the_library_have_the_masks_that_were_chosen(tmp_path: Path) -> None:
    own = fitter(tmp_path / "own")
    own.build()
    options = {part.name: "50%" if part.layer else "dense" for part in own.library.parts}
    with torch.no_grad():
        for put in (assembly.from_library, assembly.in_order):
            masks = put(own.library, options)
            assert len(masks) == sum(len(part.matrices) for part in own.library.parts if part.layer)
            weights = own.model.state_dict()
            for name, mask in masks.items():
                assert bool((mask.sum(1) == mask.shape[1] - mask.shape[1] // 2).all())
                assert not bool(weights[name][~mask].count_nonzero())
