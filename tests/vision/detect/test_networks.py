"""Backbones, the SSD, its record and its cost."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modicum.errors import InputError, ModelError
from modicum.vision.detect import backbone
from modicum.vision.detect.backbone import STRIDES, Backbone, register_backbone, scaled
from modicum.vision.detect.conv_norm import IMAGE, Channels, ConvNorm, ConvShape, fold_norms
from modicum.vision.detect.cost import CostTable
from modicum.vision.detect.detector import Detector
from modicum.vision.detect.detector_file import load_detector, save_detector
from modicum.vision.detect.loaded_images import load_training_images
from modicum.vision.detect.pruning.budget import Budget
from modicum.vision.detect.pruning.prune import PruneSettings, prune
from modicum.vision.detect.read_dataset import read_dataset
from modicum.vision.detect.recipe import Recipe
from modicum.vision.detect.resnet_v1d import Bottleneck
from modicum.vision.detect.ssd import SSD
from modicum.vision.detect.ssd_settings import SSDSettings, smallest
from modicum.vision.detect.training import new_network
from tests.bounds import assert_within
from tests.vision.detect.scenes import (
    CLASSES,
    SIZE,
    random_inputs,
    tiny_network,
    tiny_settings,
    write_voc,
)

BACKBONES = ("resnet14", "resnet26", "resnet50", "mobilenet")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_outputs_have_a_row_for_each_anchor(backbone: str) -> None:
    network = tiny_network(backbone)
    outputs = network(random_inputs())
    count = sum(h * w for h, w in network.map_sizes) * 4
    assert network.anchors.shape == (count, 4)
    assert outputs.logits.shape == (2, count, 3)
    assert outputs.offsets.shape == (2, count, 4)
    assert [tuple(x.shape[2:]) for x in outputs.features] == network.map_sizes
    assert network.map_sizes[:3] == [(SIZE[0] // s, SIZE[1] // s) for s in STRIDES]
    for tap, x in zip(network.taps, outputs.features, strict=True):
        assert x.shape[1] == network.settings.channels[tap]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_anchors_row_depends_on_its_own_cell(backbone: str) -> None:
    """The order of rows is that of anchors: a head's output at one cell moves the rows of that cell only."""
    network = tiny_network(backbone)
    head: Any = network.heads[1]
    plain = network(random_inputs(1)).logits

    def moved(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, 3:6, 2, 4] += 1  # the second anchor of the cell in row 2, column 4
        return output

    hook = head.classes.register_forward_hook(moved)
    changed = (network(random_inputs(1)).logits - plain).abs().sum(-1)[0].nonzero()[:, 0].tolist()
    hook.remove()
    rows, columns = network.map_sizes[0]
    place = rows * columns * 4 + (2 * network.map_sizes[1][1] + 4) * 4 + 1
    assert changed == [place]
    x = network.anchors[place]
    assert ((x[:2] + x[2:]) / 2).tolist() == [4.5 * 16, 2.5 * 16]


def test_a_resnet_v1d_is_built_as_its_paper_says() -> None:
    network = tiny_network("resnet26")
    stem = [m for m in network.backbone.stem if isinstance(m, ConvNorm)]  # type: ignore[union-attr]
    assert [(m.conv.kernel_size, m.conv.stride) for m in stem] == [((3, 3), (s, s)) for s in (2, 1, 1)]
    blocks = [m for m in network.modules() if isinstance(m, Bottleneck)]
    assert len(blocks) == 8
    for number, block in enumerate(blocks):
        stride = 2 if number in (2, 4, 6) else 1
        assert block.spatial.conv.stride == (stride, stride)
        assert block.reduce.conv.stride == block.expand.conv.stride == (1, 1)
        assert isinstance(block.pool, nn.AvgPool2d if stride == 2 else nn.Identity)
        is_first = number % 2 == 0
        assert isinstance(block.shortcut, ConvNorm if is_first else nn.Identity)
    usual = SSDSettings.of(CLASSES, "resnet50", 1.0).channels
    assert [usual[f"stage{n}"] for n in range(4)] == [256, 512, 1024, 2048]


class _Plain(Backbone):
    """Five convolutions of stride 2."""

    num_stages = 1
    taps = ("plain2", "plain3", "plain4")

    def __init__(self, channels: Channels, blocks: tuple[int, ...]) -> None:
        super().__init__(channels, blocks)
        names = [IMAGE, *(f"plain{k}" for k in range(5))]
        self.layers = nn.ModuleList(
            ConvNorm(channels, a, b, ConvShape(3, 2)) for a, b in itertools.pairwise(names)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for layer in self.layers:
            maps.append(x := layer(x))
        return maps[2:]

    @staticmethod
    def channels(width: float, blocks: tuple[int, ...]) -> dict[str, int]:
        return {f"plain{k}": scaled(64 * blocks[0], width) for k in range(5)}


class _Mixing(_Plain):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [found.cumsum(1) for found in super().forward(x)]


def test_a_backbone_of_ones_own_is_trained_saved_and_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NAMED", "_registered"):
        monkeypatch.setattr(backbone, name, dict(getattr(backbone, name)))
    register_backbone("plain", _Plain, (1,))
    settings = SSDSettings.of(CLASSES, "plain", 0.25, SIZE)
    detector = Detector(new_network(settings, 0).eval())
    save_detector(detector, tmp_path / "one.safetensors")
    loaded = load_detector(tmp_path / "one.safetensors")
    for a, b in zip(
        detector.network.raw_outputs(random_inputs().float()),
        loaded.network.raw_outputs(random_inputs().float()),
        strict=True,
    ):
        assert torch.equal(a, b)
    images = load_training_images(read_dataset(write_voc(tmp_path / "voc")), SIZE)
    recipe = Recipe(epochs=1, batch=4)
    how = PruneSettings(Budget("macs", 0.8, True), steps=1, step_recipe=recipe, recipe=recipe)
    assert prune(loaded, images, how).after <= 0.8 * CostTable.of(settings).macs(settings.channels)
    register_backbone("mixing", _Mixing, (1,))
    mixing = Detector(new_network(SSDSettings.of(CLASSES, "mixing", 0.25, SIZE), 0).eval())
    with pytest.raises(ModelError, match="its operation Cumsum may mix channels"):
        prune(mixing, images, how)
    with pytest.raises(InputError, match="mobilenet is a backbone of modicum's"):
        register_backbone("mobilenet", _Plain, (1,))
    with pytest.raises(ModelError, match="give 1 numbers"):
        register_backbone("other", _Plain, (1, 2))
    assert "other" not in backbone.NAMED


@pytest.mark.parametrize("backbone", BACKBONES)
def test_costs_are_counted_on_the_network(backbone: str) -> None:
    settings = tiny_settings(backbone)
    uneven = {name: number + 8 * (k % 3) for k, (name, number) in enumerate(settings.channels.items())}
    network = SSD(settings.with_channels(uneven)).eval()
    counted = 0

    def count(module: Any, _: object, output: torch.Tensor) -> None:
        nonlocal counted
        inputs = module.in_channels // module.groups
        counted += output.numel() * inputs * module.kernel_size[0] * module.kernel_size[1]

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    network(random_inputs(1))
    table = CostTable.of(settings)  # of other channels: a table serves them all
    assert table.macs(uneven) == counted
    assert table.num_parameters(uneven) == network.num_parameters


@pytest.mark.parametrize("backbone", ["resnet14", "mobilenet"])
def test_folded_norms_give_the_same(backbone: str) -> None:
    network = tiny_network(backbone).double()
    with torch.no_grad():
        expected = network(random_inputs())
        fold_norms(network)
        found = network(random_inputs())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    # Relative rounding of about 20 layers, each amplified by at most a few: 1e-10 leaves a factor of 1000.
    for a, b in ((found.logits, expected.logits), (found.offsets, expected.offsets)):
        assert_within(a, b, 1e-10 * float(b.abs().max()))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_record_comes_back_from_json(backbone: str) -> None:
    settings = tiny_settings(backbone)
    assert SSDSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    assert set(settings.backbone_groups) | set(settings.branch_groups) == set(settings.channels)


def test_fewest_channels_are_a_multiple_of_8() -> None:
    assert [smallest(n, 0.8) for n in (8, 16, 40, 64, 100, 4)] == [8, 8, 8, 16, 24, 4]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.with_channels({"stage9": 8}), "'stage9' is not known"),
        (lambda s: s.with_channels({"stage0": 0}), "stage0 has 0 channels"),
        (lambda s: SSDSettings(s.classes, s.backbone, {}), "is missing"),
        (lambda s: SSDSettings.of(("a", "a")), "each once"),
        (lambda s: SSDSettings.of((), "resnet14"), "at least one"),
        (lambda s: SSDSettings.of(("a",), "resnet14", size=(100, 96)), "multiple of 32"),
        (lambda s: SSDSettings.of(("a",), "vgg"), "choose one of resnet14"),
        (lambda s: SSDSettings.of(("a",), width_factor=0), "width factor is 0"),
    ],
)
def test_records_that_do_not_fit_are_one_line(change: Any, told: str) -> None:
    with pytest.raises((InputError, ModelError), match=told):
        change(tiny_settings())
