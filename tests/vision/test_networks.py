"""Blocks, references and saved networks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.errors import InputError
from modicum.search.costs import num_macs, num_parameters
from modicum.search.latency import block_key
from modicum.search.space import BlockSite, ReferenceBlock, SearchSpace, Variant
from modicum.vision.conv import CONV_SPACES, ConvSpaceSettings, ConvVariant, InvertedResidual, rounded
from modicum.vision.reference import ReferenceSettings
from modicum.vision.saved import VisionNetwork
from modicum.vision.transformer import TRANSFORMER_SPACES, TransformerVariant
from tests.vision.pictures import CLASSES, encoded, image_set, pixels

SMALL = ReferenceSettings("residual", (16, 24), (1, 2), depth=1, stem_channels=8, size=16)
VIT = ReferenceSettings("vit", (16, 16), (1, 1), depth=1, stem_stride=4, heads=2, size=16)
SITE = BlockSite(0, (16, 8, 8), (24, 4, 4))


def test_the_papers_space_has_384_variants_of_a_block() -> None:
    sizes = {name: len(space.variants()) for name, space in CONV_SPACES.items()}
    assert sizes == {"tiny": 4, "small": 16, "medium": 64, "full": 384}
    assert {name: len(space.variants()) for name, space in TRANSFORMER_SPACES.items()} == {
        "tiny": 4,
        "small": 12,
        "full": 18,
    }
    names = [variant.name for variant in CONV_SPACES["full"].variants()]
    assert len(set(names)) == 384


@pytest.mark.parametrize("kind", ["residual", "mobilenetv2"])
def test_every_variant_lines_up_with_a_reference(kind: str) -> None:
    chosen = ReferenceSettings(kind, (16, 24), (1, 2), stem_channels=8, size=17)  # type: ignore[arg-type]
    reference = chosen.build(3)
    space = SearchSpace(reference, chosen.example, [ReferenceBlock(), *CONV_SPACES["full"].variants()])
    assert space.num_networks == 385**2
    assert [site.key for site in space.sites] == ["8x9x9-16x9x9", "16x9x9-24x5x5"]
    with torch.no_grad():
        for picks in [(1, 384), (200, 77), (384, 1)]:
            assert space.assemble(picks, {})(torch.zeros(2, 3, 17, 17)).shape == (2, 3)


@given(
    variant=st.sampled_from(CONV_SPACES["full"].variants()), side=st.integers(3, 9), stride=st.integers(1, 3)
)
@settings(max_examples=12)
def test_what_is_checked_by_arithmetic_is_so(variant: ConvVariant, side: int, stride: int) -> None:
    after = -(-side // stride)
    site = BlockSite(0, (8, side, side), (16, after, after))
    variant.check(site)
    Variant.check(variant, site)  # runs it


def test_a_variants_parameters_and_macs_are_those_of_its_settings() -> None:
    variant = ConvVariant(5, 3, 2, "relu", "grouped", 0.5)
    block = variant.build(SITE)
    inner = rounded(12)
    hidden = rounded(3 * inner)
    weights = [
        (16 * hidden, 64),  # 1×1 on 8 × 8
        (hidden * 8 * 25, 16),  # groups of 8 channels, stride 2
        (hidden * inner, 16),
        (inner * hidden, 16),
        (hidden * 8 * 25, 16),
        (hidden * 24, 16),
    ]
    norms = 2 * (4 * hidden + inner + 24)
    assert num_parameters(block) == sum(count for count, _ in weights) + norms
    assert num_macs(block, torch.zeros(1, *SITE.input_shape)) == sum(count * size for count, size in weights)
    units = [module for module in block.modules() if isinstance(module, InvertedResidual)]
    assert [unit.is_residual for unit in units] == [False, False]


def test_transformer_variants_with_and_without_attention() -> None:
    site = BlockSite(0, (9, 16), (9, 16))
    plain, attentive = TransformerVariant(2, 0, 2.0), TransformerVariant(2, 4, 2.0)
    macs = {v: num_macs(v.build(site), torch.zeros(1, 9, 16)) for v in (plain, attentive)}
    feed_forward = 2 * 9 * 16 * 32 * 2
    assert macs[plain] == feed_forward
    assert macs[attentive] == feed_forward + 2 * (9 * 16 * 64 + 2 * 9 * 9 * 16)
    assert VIT.build(3)(torch.zeros(2, 3, 16, 16)).shape == (2, 3)
    space = SearchSpace(VIT.build(3), VIT.example, TRANSFORMER_SPACES["full"].variants())
    assert space.sizes == (18, 18)
    with pytest.raises(InputError, match="no multiple of 5 heads"):
        TransformerVariant(1, 5).build(site)
    with pytest.raises(InputError, match="block 0 turns"):
        TransformerVariant().build(SITE)


@pytest.mark.parametrize("shape", [(24, 8, 4), (24, 5, 5), (24, 16, 16), (9, 24)])
def test_conv_variants_refuse_shapes_that_no_stride_gives(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"block 0 turns \[16, 8, 8\]"):
        ConvVariant().build(BlockSite(0, (16, 8, 8), shape))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvVariant(kernel=4), "odd kernel"),
        (lambda: ConvVariant(width=0.0), "width is 0"),
        (lambda: ConvVariant(activation="gelu"), "relu or swish_se"),  # type: ignore[arg-type]
        (lambda: ConvSpaceSettings(kernels=()), "at least one value"),
        (lambda: TransformerVariant(0), "depth of 1 or more"),
        (lambda: ReferenceSettings("vgg"), "residual, mobilenetv2, vit"),  # type: ignore[arg-type]
        (lambda: ReferenceSettings(channels=(8,), strides=(1, 2)), "1 channels and 2 strides"),
        (lambda: ReferenceSettings(depth=0), "depth is 0: give a whole number from 1"),
        (lambda: ReferenceSettings("vit", (10,), (1,), heads=4), "heads do not divide"),
    ],
)
def test_settings_are_checked(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("reference", [SMALL, VIT], ids=["conv", "vit"])
def test_a_saved_network_is_itself(reference: ReferenceSettings, tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="needs pillow: pip install 'modicum[vision]'")
    variant = TransformerVariant(1, 0, 2.0) if reference is VIT else ConvVariant(3, 2, 1)
    space = SearchSpace(reference.build(3), reference.example, [ReferenceBlock(), variant])
    network = space.assemble((0, 1), {})
    images = image_set(6)
    VisionNetwork.of(network, reference, [ReferenceBlock(), variant], images, {"a": 1}).save(tmp_path / "n")
    found = VisionNetwork.load(tmp_path / "n")
    assert found.classes == CLASSES
    assert found.about == {"a": 1}
    rows = torch.arange(6)
    with torch.no_grad():
        expected = network(images[rows])
        assert torch.equal(found.network(images[rows]), expected)
    path = tmp_path / "one.png"
    path.write_bytes(encoded(pixels(6)[0][4]))
    told = found.classify(path)
    assert told.label == CLASSES[int(expected[4].argmax())]
    assert list(told.probabilities.values()) == sorted(told.probabilities.values(), reverse=True)
    assert sum(told.probabilities.values()) == pytest.approx(1, abs=1e-5)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    network = SMALL.build(3)
    saved = VisionNetwork.of(network, SMALL, [ReferenceBlock()] * 2, image_set(6), {})
    with pytest.raises(InputError, match="is no saved network"):
        VisionNetwork.load(tmp_path / "none")
    saved.save(tmp_path)
    config = tmp_path / "network.json"
    told = json.loads(config.read_text())
    for change in ({"format": 9}, {"blocks": [{"kind": "other"}] * 2}, {"reference": {"kinds": 1}}):
        config.write_text(json.dumps(told | change))
        with pytest.raises(InputError):
            VisionNetwork.load(tmp_path)
    config.write_text(json.dumps(told))
    weights = tmp_path / "network.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(InputError, match="is no saved network"):
        VisionNetwork.load(tmp_path)


def test_blocks_of_other_heads_have_other_keys_in_a_table() -> None:
    keys = set()
    for heads in (1, 2, 4):
        vit = replace(VIT, heads=heads)
        space = SearchSpace(vit.build(3), vit.example, [ReferenceBlock()])
        keys.add(block_key(space, 0, 0))
    assert len(keys) == 3
