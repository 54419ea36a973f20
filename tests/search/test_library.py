"""Libraries: what is trained, kept, gone on with, dropped and refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from modicum.errors import InputError
from modicum.search.blockwise import BlockFeatures, BlockwiseSettings, block_error, train_block
from modicum.search.categories import encoded, predicted_errors
from modicum.search.library import BlockLibrary
from modicum.search.noise import ErrorSums
from modicum.search.space import BlockSite, ReferenceBlock, SearchSpace
from tests.search.networks import CHANNELS, Conv, inputs, network

SETTINGS = BlockwiseSettings(epochs=8, batch=8, learning_rate=2e-2)
VARIANTS = [ReferenceBlock(), Conv(1), Conv(3)]


def space(seed: int = 0) -> SearchSpace:
    return SearchSpace(network(seed=seed), inputs(1), VARIANTS)


def build(folder: Path, **more: object) -> BlockLibrary:
    return BlockLibrary.build(space(), inputs(), inputs(24, 2), folder, SETTINGS, **more)  # type: ignore[arg-type]


def test_errors_are_of_held_out_outputs_and_fall_with_training(tmp_path: Path) -> None:
    library = build(tmp_path)
    assert len(library.entries) == 6
    reference = library.space.reference
    held = inputs(24, 2)
    for (number, name), entry in library.entries.items():
        picks = [0, 0]
        picks[number] = [v.name for v in VARIANTS].index(name)
        block = library.space.assemble(tuple(picks), library.weights(tuple(picks))).blocks[number]
        with torch.no_grad():
            before = reference.features(held, number)
            sums = ErrorSums(CHANNELS)
            sums.add(reference.blocks[number](before), block(before))
        assert entry.error == pytest.approx(sums.value, rel=1e-5, abs=1e-12)
        if name == "reference":
            assert entry.error == 0
        elif name == Conv(3).name:
            assert entry.error < 0.9  # 1 is what the channels' means have
    # A kernel of 3 sees what the reference's blocks see, one of 1 does not.
    for number in (0, 1):
        assert library.entries[number, Conv(3).name].error < library.entries[number, Conv(1).name].error
    assert library.usable() == [[0, 1, 2], [0, 1, 2]]
    assert library.entries[0, Conv(1).name].macs == CHANNELS * CHANNELS * 36
    assert library.entries[0, Conv(1).name].parameters == CHANNELS * CHANNELS + 3 * CHANNELS


def test_features_are_the_same_kept_or_made_again() -> None:
    kept = BlockFeatures(network(), 1, inputs(), 2**20)
    made = BlockFeatures(network(), 1, inputs(), 0)
    rows = torch.tensor([5, 0, 47])
    for a, b in zip(kept.pair(rows), made.pair(rows), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert torch.equal(kept.variance, made.variance)


def test_a_run_goes_on_where_it_stopped_and_gives_the_same(tmp_path: Path) -> None:
    whole = build(tmp_path / "whole")

    def stop(_: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "stopped", progress=stop)
    assert len(BlockLibrary.open(tmp_path / "stopped", space()).entries) == 3
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "stopped").rglob("*.safetensors")}
    seen: list[int] = []
    found = build(tmp_path / "stopped", progress=lambda _, done, total: seen.append(done))
    assert seen == [3, 4, 5, 6]
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    for key, entry in whole.entries.items():
        assert replace(found.entries[key], seconds=0) == replace(entry, seconds=0)
    assert not list(tmp_path.rglob("*.part"))


def test_a_damaged_file_is_trained_again(tmp_path: Path) -> None:
    library = build(tmp_path)
    path = tmp_path / "block0" / f"{Conv(3).name}.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    assert build(tmp_path).entries[0, Conv(3).name].error == library.entries[0, Conv(3).name].error


def test_only_wanted_variants_are_trained(tmp_path: Path) -> None:
    library = build(tmp_path, wanted={0: (Conv(1).name,), 1: ()})
    assert list(library.entries) == [(0, Conv(1).name)]
    with pytest.raises(InputError, match="no variant of block 1 is trained"):
        library.usable()
    with pytest.raises(InputError, match="no variant 'k3-c4-s1' of block 0: build it first"):
        library.weights((2, 1))


class _Broken(Conv):
    """Its output is not finite."""

    def build(self, site: BlockSite) -> nn.Module:
        block = super().build(site)
        nn.init.constant_(block[0].weight, math.nan)  # type: ignore[index]
        return block


def test_a_variant_whose_training_fails_is_dropped_and_told(tmp_path: Path) -> None:
    broken = SearchSpace(network(), inputs(1), [Conv(3), _Broken(1)])
    library = BlockLibrary.build(broken, inputs(), inputs(24, 2), tmp_path, SETTINGS)
    assert [(e.block, e.variant) for e in library.failed] == [(0, Conv(1).name), (1, Conv(1).name)]
    assert library.usable() == [[0], [0]]
    with pytest.raises(InputError, match="'k1-c4-s1' of block 1 failed"):
        library.weights((0, 1))
    again = BlockLibrary.open(tmp_path, broken)
    assert not again.entries[0, Conv(1).name].is_usable
    worse = SearchSpace(network(), inputs(1), [_Broken(1)])
    with pytest.raises(InputError, match=r"no variant of block 0.*lower learning rate"):
        BlockLibrary.build(worse, inputs(), inputs(24, 2), tmp_path / "b", SETTINGS).usable()


def test_a_training_that_diverges_is_noticed() -> None:
    features = BlockFeatures(network(), 0, inputs(), 2**20)
    block = Conv(3).build(SearchSpace(network(), inputs(1), [Conv()]).sites[0])
    block[0].weight.data.mul_(1e30)  # type: ignore[index]
    with torch.no_grad():
        block[1].running_var.fill_(1.0)  # type: ignore[index]
    assert not train_block(block, features, replace(SETTINGS, learning_rate=1e30))


def test_a_library_of_another_reference_inputs_or_settings_is_refused(tmp_path: Path) -> None:
    build(tmp_path)
    with pytest.raises(InputError, match=r"library of the reference [0-9a-f]{16}, and this one is"):
        BlockLibrary.open(tmp_path, space(seed=5))
    with pytest.raises(InputError, match="another reference"):
        BlockLibrary.build(space(seed=5), inputs(), inputs(24, 2), tmp_path, SETTINGS)
    with pytest.raises(InputError, match="another train "):
        BlockLibrary.build(space(), inputs(seed=9), inputs(24, 2), tmp_path, SETTINGS)
    with pytest.raises(InputError, match="another settings"):
        BlockLibrary.build(space(), inputs(), inputs(24, 2), tmp_path, replace(SETTINGS, epochs=1))
    # How much is kept in memory changes nothing.
    BlockLibrary.build(space(), inputs(), inputs(24, 2), tmp_path, replace(SETTINGS, cache_nbytes=0))
    with pytest.raises(InputError, match=r"has no library\.json"):
        BlockLibrary.open(tmp_path / "none", space())
    (tmp_path / "library.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        BlockLibrary.open(tmp_path, space())
    with pytest.raises(InputError, match="0 inputs to learn from"):
        BlockLibrary.build(space(), inputs(0), inputs(), tmp_path / "c", SETTINGS)


def test_the_header_tells_what_the_library_is_of(tmp_path: Path) -> None:
    build(tmp_path)
    told = json.loads((tmp_path / "library.json").read_text())
    assert told["sites"] == ["4x6x6-4x6x6"] * 2
    assert told["settings"]["epochs"] == 8


def test_block_errors_do_not_depend_on_the_batch() -> None:
    features = BlockFeatures(network(), 0, inputs(), 2**20)
    block = Conv(3).build(SearchSpace(network(), inputs(1), [Conv()]).sites[0]).eval()
    assert block_error(block, features, 5) == pytest.approx(block_error(block, features, 48), rel=1e-5)


def test_errors_of_untrained_variants_follow_their_settings() -> None:
    variants = [Conv(k, c, s) for k in (1, 3, 5) for c in (2, 4) for s in (1.0, 2.0)]
    truth = {v.name: 0.5 / v.kernel / v.channels * v.scale for v in variants}
    known = {v.name: truth[v.name] for v in variants if (v.kernel, v.channels) != (5, 4)}
    errors, predictor = predicted_errors(variants, known)
    assert predictor is not None
    assert predictor.kendall_tau > 0.9
    assert errors.keys() == truth.keys()
    for name, error in errors.items():
        assert error == pytest.approx(truth[name], rel=0 if name in known else 0.1)
    assert len(encoded(variants)[0]) == 3 + 2 + 2
    # What failed is not predicted; too few give nothing.
    assert variants[0].name not in predicted_errors(variants, known | {variants[0].name: math.nan})[0]
    few = {v.name: 1.0 for v in variants[:3]}
    assert predicted_errors(variants, few) == (few, None)


@pytest.mark.parametrize("settings", [{"epochs": 0}, {"learning_rate": 0.0}, {"cache_nbytes": -1}])
def test_settings_are_checked(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        BlockwiseSettings(**settings)  # type: ignore[arg-type]
