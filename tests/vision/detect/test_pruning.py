"""Cutting channels, scores, allocation under a budget, and the whole of pruning."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from modicum.errors import InputError, ModelError
from modicum.search.noise import noise_to_signal
from modicum.vision.detect.augment import NONE
from modicum.vision.detect.cost import CostTable
from modicum.vision.detect.deletion import delete_branch_channels, highest
from modicum.vision.detect.detector import Detector
from modicum.vision.detect.detector_file import check_shapes, load_detector, save_detector
from modicum.vision.detect.loaded_images import TrainingImage, load_training_images
from modicum.vision.detect.pruning import budget, channel_graph
from modicum.vision.detect.pruning.budget import Budget, CostModel
from modicum.vision.detect.pruning.channel_graph import kept_network, members
from modicum.vision.detect.pruning.channel_scores import channel_scores
from modicum.vision.detect.pruning.greedy import Allocation, greedy_channels, greedy_path
from modicum.vision.detect.pruning.prune import PruneSettings, prune
from modicum.vision.detect.pruning.sensitivity import (
    _counts,
    knapsack_channels,
    sensitivities,
    switched_off,
)
from modicum.vision.detect.read_dataset import read_dataset
from modicum.vision.detect.recipe import Recipe
from modicum.vision.detect.ssd import SSD
from modicum.vision.detect.ssd_settings import smallest
from modicum.vision.detect.training import DetectorTraining
from tests.bounds import assert_within
from tests.vision.detect.scenes import SIZE, random_inputs, tiny_detector, tiny_network, write_voc

BACKBONES = ("resnet14", "mobilenet")
SHORT = Recipe(epochs=1, batch=2, learning_rate=1e-3)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[TrainingImage]:
    folder = write_voc(tmp_path_factory.mktemp("data") / "voc")
    return load_training_images(read_dataset(folder), SIZE)


@pytest.fixture(scope="module")
def networks() -> dict[str, SSD]:
    return {name: tiny_network(name, 0.1875) for name in BACKBONES}


def random_choice(network: SSD, seed: int) -> dict[str, Tensor]:
    """Some channels of some groups."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for name, count in network.settings.channels.items():
        if float(torch.rand((), generator=generator)) < 0.7:
            stays = int(torch.randint(1, count + 1, (), generator=generator))
            kept[name] = torch.randperm(count, generator=generator)[:stays]
    return kept


@pytest.mark.parametrize("backbone", BACKBONES)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=5)
def test_a_cut_network_is_the_whole_one_with_channels_off(
    networks: dict[str, SSD], backbone: str, seed: int
) -> None:
    """And every tensor has the shape that its record says."""
    network = networks[backbone]
    kept = random_choice(network, seed)
    cut = kept_network(network, kept)
    check_shapes(cut)
    for name, count in network.settings.channels.items():
        assert cut.settings.channels[name] == len(kept.get(name, range(count)))
    assert cut.num_parameters == CostTable.of(cut.settings).num_parameters(cut.settings.channels)
    inputs = random_inputs(1)
    with contextlib.ExitStack() as stack, torch.no_grad():
        for name, stays in kept.items():
            off = sorted(set(range(network.settings.channels[name])) - set(stays.tolist()))
            stack.enter_context(switched_off(network, name, torch.tensor(off, dtype=torch.long)))
        expected, found = network(inputs), cut(inputs)
    # Sums in another order: a relative error of √chain·u in each of at most 30 layers, amplified by a few.
    for a, b in ((found.logits, expected.logits), (found.offsets, expected.offsets)):
        assert_within(a, b, 1e-4 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_pruned_file_gives_the_same_boxes(networks: dict[str, SSD], backbone: str, tmp_path: Path) -> None:
    cut = Detector(kept_network(networks[backbone], random_choice(networks[backbone], 1)))
    save_detector(cut, tmp_path / "cut.safetensors")
    loaded = load_detector(tmp_path / "cut.safetensors")
    for a, b in zip(cut.detect_inputs(random_inputs()), loaded.detect_inputs(random_inputs()), strict=True):
        assert len(a) > 0
        assert torch.equal(a.boxes, b.boxes)
        assert torch.equal(a.scores, b.scores)
        assert torch.equal(a.labels, b.labels)


def test_the_given_network_is_left_as_it_was() -> None:
    network = tiny_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    kept_network(network, random_choice(network, 2))
    delete_branch_channels(network, 0.5)
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


class _Odd(nn.Module):
    """Mixes channels in a way that no cut can follow."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


def test_an_operation_that_cannot_be_cut_is_named() -> None:
    network = tiny_network()
    network.backbone.stem[1].act = _Odd()  # type: ignore[index, union-attr]
    for use in (members, lambda n: kept_network(n, random_choice(n, 0))):
        with pytest.raises(ModelError, match="its operation Cumsum may mix channels"):
            use(network)


def test_keeping_no_channel_is_refused() -> None:
    with pytest.raises(ModelError, match="no channel of stage0 would stay"):
        kept_network(tiny_network(), {"stage0": torch.zeros(0, dtype=torch.long)})


def test_branches_lose_a_share_and_keep_their_best() -> None:
    network = tiny_network(width=0.25)
    cut = delete_branch_channels(network, 0.5)
    scores = channel_scores(network, "magnitude")
    for name, count in network.settings.channels.items():
        is_branch = name in network.settings.branch_groups
        wanted = max(8, round(count / 2 / 8) * 8) if is_branch else count
        assert cut.settings.channels[name] == wanted
    best = highest(scores["head0"], cut.settings.channels["head0"])
    inner: Any = cut.heads[0]
    whole: Any = network.heads[0]
    assert torch.equal(inner.classes.weight, whole.classes.weight[:, best])
    assert torch.equal(inner.classes.bias, whole.classes.bias)
    with pytest.raises(InputError, match="factor of the branches is 0"):
        delete_branch_channels(network, 0.0)


@pytest.mark.parametrize("score", ["magnitude", "taylor", "bn"])
def test_scores_are_those_of_loops(score: Any, images: list[TrainingImage]) -> None:
    network = tiny_network(width=0.125).double()
    batch = DetectorTraining(network, images, Recipe(batch=2, augment=NONE)).batch(0)
    found = channel_scores(network, score, [batch])
    from modicum.vision.detect.pruning.channel_scores import mean_gradients

    gradients = mean_gradients(network, [batch])
    parameters = dict(network.named_parameters())
    for name, group in members(network).items():
        total = [0.0] * network.settings.channels[name]
        used = 0
        for member in group:
            if (score == "bn") != (member.axis == "norm") and score != "taylor":
                continue
            used += 1
            weight = parameters[f"{member.name}.weight"].detach()
            gradient = gradients[f"{member.name}.weight"]
            sizes = []
            for channel in range(len(total)):
                w = weight[:, channel] if member.axis == "in" else weight[channel]
                g = gradient[:, channel] if member.axis == "in" else gradient[channel]
                values = [(float(a), float(b)) for a, b in zip(w.flatten(), g.flatten(), strict=True)]
                if score == "taylor":
                    sizes.append(sum(abs(a * b) for a, b in values))
                else:
                    sizes.append(sum(a * a for a, _ in values) ** 0.5)
            rms = (sum(x * x for x in sizes) / len(sizes)) ** 0.5
            for channel, size in enumerate(sizes):
                total[channel] += size / rms if rms > 0 else 1.0
        assert used
        mean = sum(total) / len(total)
        assert found[name].tolist() == pytest.approx([x / mean for x in total], rel=1e-9)


def test_taylor_needs_images_and_names_are_checked() -> None:
    with pytest.raises(InputError, match="taylor needs images"):
        channel_scores(tiny_network(), "taylor")
    with pytest.raises(InputError, match="choose one of magnitude"):
        PruneSettings(Budget("macs", 0.5, True), score="best")  # type: ignore[arg-type]


def allocation(network: SSD, resource: Any = "macs", max_ratio: float = 0.8) -> Allocation:
    channels = network.settings.channels
    least = {name: smallest(channels[name], max_ratio) for name in network.settings.backbone_groups}
    return Allocation(channels, least, CostModel(network.settings, resource))


@pytest.mark.parametrize("is_per_cost", [True, False])
def test_the_greedy_path_takes_the_cheapest_cut_each_time(is_per_cost: bool) -> None:
    network = tiny_network(width=0.25)
    given_ = allocation(network)
    scores = channel_scores(network, "magnitude")
    path = list(greedy_path(given_, scores, is_per_cost))
    assert path[0] == dict(given_.channels)
    assert path[-1] == given_.smallest()
    for before, after in itertools.pairwise(path):
        values = {}
        for name, least in given_.least.items():
            count = before[name]
            if count <= least:
                continue
            smaller = max(least, (count - 1) // 8 * 8)
            ranked = sorted(scores[name].tolist())
            cut = ranked[len(ranked) - count : len(ranked) - smaller]
            if is_per_cost:
                saved = given_.model.cost(before) - given_.model.cost({**before, name: smaller})
                values[name] = sum(cut) / sum(ranked) / saved
            else:
                values[name] = sum(cut) / len(cut)
        (changed,) = [name for name in before if before[name] != after[name]]
        assert values[changed] <= min(values.values()) * (1 + 1e-9)
        assert after[changed] % 8 == 0


@pytest.mark.parametrize("resource", ["macs", "bytes"])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_both_allocators_keep_the_budget(resource: Any, share: float) -> None:
    network = tiny_network(width=0.25)
    given_ = allocation(network, resource)
    scores = channel_scores(network, "magnitude")
    smallest_cost = given_.model.cost(given_.smallest())
    whole = given_.model.cost(given_.channels)
    limit = smallest_cost + share * (whole - smallest_cost)
    random = torch.Generator().manual_seed(0)
    ratios = {
        name: {
            given_.channels[name]: 0.0,
            **{
                n: float(torch.rand((), generator=random)) + k
                for k, n in enumerate(_counts(given_.channels[name], least))
            },
        }
        for name, least in given_.least.items()
    }
    for channels in (
        greedy_channels(given_, scores, limit, True),
        knapsack_channels(given_, ratios, limit),
    ):
        assert given_.model.cost(channels) <= limit
        for name, least in given_.least.items():
            assert least <= channels[name] <= given_.channels[name]
    # The greedy record before the chosen one is over the budget.
    path = list(greedy_path(given_, scores, True))
    place = path.index(greedy_channels(given_, scores, limit, True))
    assert place == 0 or given_.model.cost(path[place - 1]) > limit


def test_the_knapsack_finds_what_brute_force_finds_where_costs_are_additive() -> None:
    """Groups of different blocks share no convolution, so their savings add up exactly."""
    network = tiny_network(width=0.25)
    channels, model = network.settings.channels, CostModel(network.settings, "macs")
    names = ("stem.0", "stage1.0.0", "stage2.0.0", "stage3.0.0")
    least = dict.fromkeys(names, 8)
    random = torch.Generator().manual_seed(1)
    ratios: dict[str, dict[int, float]] = {}
    for name in names:
        counts = [channels[name], *range(channels[name] - 8, 7, -8)]
        ratios[name] = {n: k + float(torch.rand((), generator=random)) for k, n in enumerate(counts)}
        ratios[name][channels[name]] = 0.0
    whole, low = model.cost(channels), model.cost({**channels, **least})
    for share in (0.3, 0.6, 0.85):
        limit = low + share * (whole - low)
        best = min(
            sum(ratios[name][n] for name, n in zip(names, picks, strict=True))
            for picks in itertools.product(*(ratios[name] for name in names))
            if model.cost({**channels, **dict(zip(names, picks, strict=True))}) <= limit
        )
        found = knapsack_channels(Allocation(channels, least, model), ratios, limit)
        loss = sum(ratios[name][found[name]] for name in names)
        # The limit is searched to a thousandth of the whole cost.
        slack = limit - 2e-3 * whole
        reachable = min(
            sum(ratios[name][n] for name, n in zip(names, picks, strict=True))
            for picks in itertools.product(*(ratios[name] for name in names))
            if model.cost({**channels, **dict(zip(names, picks, strict=True))}) <= slack
        )
        assert best - 1e-9 <= loss <= reachable + 1e-9


def test_sensitivities_are_the_noise_of_the_outputs() -> None:
    network = tiny_network(width=0.25)
    given_ = allocation(network)
    names = ("stage1", "stage2.0.1")
    given_ = Allocation(given_.channels, {name: given_.least[name] for name in names}, given_.model)
    scores = channel_scores(network, "magnitude")
    inputs = [random_inputs(2, 1), random_inputs(2, 2)]
    found = sensitivities(network, given_, scores, inputs)
    with torch.no_grad():
        expected = network.raw_outputs(torch.cat(inputs))
        for name in names:
            order = scores[name].argsort()
            assert found[name][given_.channels[name]] == 0
            for stays, value in found[name].items():
                kept = {name: order[len(order) - stays :]}
                outputs = kept_network(network, kept).raw_outputs(torch.cat(inputs))
                noise = [
                    float(noise_to_signal(a.double(), b.double(), b.double().var((0, 2, 3), correction=0)))
                    for a, b in zip(outputs, expected, strict=True)
                ]
                assert value == pytest.approx(sum(noise) / len(noise), rel=1e-3, abs=1e-9)
    values = list(found["stage1"].values())
    assert values[-1] > values[0]


@pytest.mark.parametrize(
    ("resource", "text", "limit", "is_share"),
    [
        ("macs", "60M", 6e7, False),
        ("macs", "25%", 0.25, True),
        ("bytes", "500KB", 5e5, False),
        ("bytes", "2MiB", 2**21, False),
        ("latency", "3.5ms", 3.5e-3, False),
        ("latency", "1 s", 1.0, False),
    ],
)
def test_budgets_are_read(resource: Any, text: str, limit: float, is_share: bool) -> None:
    budget = Budget.parse(resource, text)
    assert budget.limit == pytest.approx(limit)
    assert budget.is_share is is_share


@pytest.mark.parametrize(
    ("resource", "text"),
    [
        ("macs", "60ms"),
        ("bytes", "0"),
        ("latency", "5"),
        ("macs", "-3M"),
        ("macs", "120%"),
        ("bytes", "1.2.3KB"),
    ],
)
def test_budgets_that_are_none_are_one_line(resource: Any, text: str) -> None:
    with pytest.raises(InputError, match="the budget of"):
        Budget.parse(resource, text)


@pytest.mark.parametrize("allocator", ["greedy", "knapsack"])
def test_pruning_keeps_the_budget_and_leaves_outputs(allocator: Any, images: list[TrainingImage]) -> None:
    teacher = tiny_detector()
    settings_ = PruneSettings(
        Budget("macs", 0.5, is_share=True),
        allocator=allocator,
        steps=2 if allocator == "greedy" else 1,
        step_recipe=SHORT,
        recipe=SHORT,
    )
    result = prune(teacher, images, settings_)
    found = result.detector.network
    check_shapes(found)
    assert result.after <= result.limit == pytest.approx(0.5 * result.before)
    assert result.after == CostTable.of(found.settings).macs(found.settings.channels)
    assert found.settings.classes == teacher.classes
    assert len(result.losses) == 2
    whole = result.channels_before
    for name, count in found.settings.channels.items():
        assert count % 8 == 0
        if name in found.settings.backbone_groups:
            assert count >= smallest(whole[name], 0.8)


def test_cuts_are_at_equal_ratios(images: list[TrainingImage], tmp_path: Path) -> None:
    teacher = Detector(tiny_network(width=0.5))
    settings_ = PruneSettings(
        Budget("macs", 0.25, True), steps=3, branch_factor=1.0, step_recipe=SHORT, recipe=SHORT
    )
    result = prune(teacher, images, settings_, state=tmp_path / "state")
    model = CostModel(teacher.network.settings, "macs")
    costs = [
        model.cost(load_detector(tmp_path / f"state/cut-{step}.safetensors").network.settings.channels)
        for step in (1, 2, 3)
    ]
    for step, cost in enumerate(costs, 1):
        target = result.before * 0.25 ** (step / 3)
        # Greedy stops at the first cut within the target; one cut takes 8 channels of one group.
        assert 0.75 * target < cost <= target * (1 + 1e-9)


def test_guidance_and_branches_are_what_the_settings_say(images: list[TrainingImage]) -> None:
    found = {}
    for name, change in {
        "guided": {},
        "alone": {"guidance": None},
        "branches": {"prunes_branches": True, "branch_factor": 1.0},
    }.items():
        options: dict[str, Any] = {"budget": Budget("macs", 0.6, True), "steps": 1, "recipe": SHORT, **change}
        found[name] = prune(Detector(tiny_network(width=0.25)), images, PruneSettings(**options))
    a, b = (found[name].detector.network for name in ("guided", "alone"))
    assert a.settings == b.settings
    assert not torch.equal(a.heads[0].classes.weight, b.heads[0].classes.weight)  # type: ignore[union-attr, arg-type]
    pruned = found["branches"]
    cut = [
        name
        for name in pruned.detector.network.settings.branch_groups
        if pruned.detector.network.settings.channels[name] < pruned.channels_before[name]
    ]
    assert cut


def test_a_cut_that_leaves_a_tensor_as_it_was_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny_network()
    monkeypatch.setattr(channel_graph, "_group", lambda *_: SimpleNamespace(prune=lambda: None))
    with pytest.raises(
        ModelError, match=r"has the shape \[64, 16, 1, 1\] and its record says \[8, 16, 1, 1\]"
    ):
        kept_network(network, {"stage1": torch.arange(8)})


def test_tensors_that_lie_elsewhere_than_the_names_say_are_found() -> None:
    network = tiny_network()
    network.heads[0].inner.outputs = "head1"  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="do not lie where the network's names say"):
        members(network)


def test_a_folder_of_others_is_not_taken_for_a_run(images: list[TrainingImage], tmp_path: Path) -> None:
    settings_ = PruneSettings(Budget("macs", 0.6, True), steps=1, step_recipe=SHORT, recipe=SHORT)
    (tmp_path / "letter.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(InputError, match="is not of a pruning"):
        prune(tiny_detector(), images, settings_, state=tmp_path)
    assert (tmp_path / "letter.txt").read_text(encoding="utf-8") == "dear"
    with pytest.raises(InputError, match="is not of a pruning"):
        prune(tiny_detector(), images, settings_, state=tmp_path / "letter.txt")


def test_a_time_is_measured_again_at_the_end(
    images: list[TrainingImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_ = PruneSettings(Budget("latency", 10.0), steps=1, step_recipe=SHORT, recipe=SHORT)
    with pytest.raises(InputError, match=r"the detector takes .* ms already"):
        prune(tiny_detector(), images, settings_)  # really measured
    unit = 1e-6

    def seconds(network: SSD) -> float:
        return network.num_parameters * unit

    def slower(doing: str, *_: int) -> None:
        nonlocal unit
        if "the last cut" in doing:
            unit = 2e-6

    monkeypatch.setattr(budget, "median_seconds", seconds)
    settings_ = PruneSettings(Budget("latency", 0.8, True), steps=1, step_recipe=SHORT, recipe=SHORT)
    result = prune(tiny_detector(), images, settings_)
    assert result.after == seconds(result.detector.network) <= result.limit
    with pytest.warns(UserWarning, match=r"measured again, the pruned detector takes [\d.]+ ms, more than"):
        result = prune(tiny_detector(), images, settings_, progress=slower)
    assert result.after == seconds(result.detector.network) > result.limit


def test_a_budget_of_time_uses_what_was_measured(images: list[TrainingImage]) -> None:
    network = tiny_network(width=0.25)
    model = CostModel(network.settings, "latency", measure=lambda n: n.num_parameters * 1e-9)
    channels = network.settings.channels
    least = dict.fromkeys(network.settings.backbone_groups, 8)
    limit = 0.5 * model.cost(channels)
    found = greedy_channels(
        Allocation(channels, least, model), channel_scores(network, "magnitude"), limit, True
    )
    assert SSD(network.settings.with_channels(found)).num_parameters * 1e-9 <= limit


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"budget": Budget("macs", 0.01, True)}, "and the smallest network takes"),
        ({"budget": Budget("bytes", 100.0)}, "and the smallest network takes"),
        ({"budget": Budget("macs", 1e12)}, "the detector takes .* already"),
        ({"steps": 0}, "steps is 0"),
        ({"max_ratio": 1.0}, "max_ratio is 1"),
        ({"branch_factor": 0.0}, "branch_factor is 0"),
        ({"allocator": "lucky"}, "choose greedy or knapsack"),
    ],
)
def test_bad_settings_are_one_line(images: list[TrainingImage], change: dict[str, Any], told: str) -> None:
    options: dict[str, Any] = {"budget": Budget("macs", 0.5, True), "step_recipe": SHORT, "recipe": SHORT}
    with pytest.raises(InputError, match=told):
        prune(tiny_detector(), images, PruneSettings(**{**options, **change}))


def test_a_stopped_pruning_goes_on_and_ends_as_if_it_had_not_been(
    images: list[TrainingImage], tmp_path: Path
) -> None:
    recipe = Recipe(epochs=2, batch=2, learning_rate=1e-3, save_every=1)
    settings_ = PruneSettings(Budget("macs", 0.6, True), steps=2, step_recipe=recipe, recipe=recipe)
    whole = prune(tiny_detector(), images, settings_)

    class StopError(Exception):
        pass

    for stop in (2, 4, 3):  # within the first training twice, then within the last
        calls = 0

        def tell(*_: object, stop: int = stop) -> None:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise StopError

        with pytest.raises(StopError):
            prune(tiny_detector(), images, settings_, state=tmp_path / "state", progress=tell)
    resumed = prune(tiny_detector(), images, settings_, state=tmp_path / "state")
    a, b = whole.detector.network.state_dict(), resumed.detector.network.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a if not name.endswith("num_batches_tracked"))
    other = PruneSettings(Budget("macs", 0.7, True), steps=2, step_recipe=recipe, recipe=recipe)
    with pytest.raises(InputError, match="is of a run with another"):
        prune(tiny_detector(), images, other, state=tmp_path / "state")
    with pytest.raises(InputError, match="is of a run with another"):
        prune(tiny_detector(seed=1), images, settings_, state=tmp_path / "state")
    with pytest.raises(InputError, match="is of a run with another"):
        prune(tiny_detector(), images[::-1], settings_, state=tmp_path / "state")


def test_a_stopped_pruning_to_a_time_keeps_its_budget(
    images: list[TrainingImage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A time is never measured twice alike."""
    measured = iter(range(10**6))
    monkeypatch.setattr(
        "modicum.vision.detect.pruning.budget.median_seconds",
        lambda network: network.num_parameters * 1e-9 * (1 + next(measured) * 1e-6),
    )
    recipe = Recipe(epochs=1, batch=2, learning_rate=1e-3, save_every=1)
    settings_ = PruneSettings(Budget("latency", 0.7, True), steps=1, step_recipe=recipe, recipe=recipe)

    def stop(_: str, done: int, __: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(tiny_detector(), images, settings_, state=tmp_path / "state", progress=stop)
    before = json.loads((tmp_path / "state/run.json").read_text())["before"]
    result = prune(tiny_detector(), images, settings_, state=tmp_path / "state")
    assert result.before == before
    (tmp_path / "state/run.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        prune(tiny_detector(), images, settings_, state=tmp_path / "state")


def test_a_step_that_was_cut_is_not_cut_otherwise_by_other_times(
    images: list[TrainingImage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the training between two cuts; measured times then favour other channels."""
    weights = {"now": 1.0, "later": 1.0}

    def seconds(network: SSD) -> float:
        shares = list(network.settings.channels.values())
        half = len(shares) // 2
        return (weights["now"] * sum(shares[:half]) + weights["later"] * sum(shares[half:])) * 1e-9

    monkeypatch.setattr("modicum.vision.detect.pruning.budget.median_seconds", seconds)
    recipe = Recipe(epochs=1, batch=2, learning_rate=1e-3, save_every=1)
    settings_ = PruneSettings(Budget("latency", 0.7, True), steps=2, step_recipe=recipe, recipe=recipe)

    def stop(doing: str, done: int, __: int) -> None:
        if "step 1" in doing and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(tiny_detector(), images, settings_, state=tmp_path / "state", progress=stop)
    cut = load_detector(tmp_path / "state/cut-1.safetensors").network.settings.channels
    weights |= {"now": 3.0, "later": 0.1}
    prune(tiny_detector(), images, settings_, state=tmp_path / "state")
    assert load_detector(tmp_path / "state/step-1.safetensors").network.settings.channels == cut


def test_bytes_before_are_those_of_the_given_file(images: list[TrainingImage], tmp_path: Path) -> None:
    given = tiny_detector()
    nbytes = save_detector(given, tmp_path / "given.safetensors")
    result = prune(
        given, images, PruneSettings(Budget("bytes", 0.7, True), steps=1, step_recipe=SHORT, recipe=SHORT)
    )
    assert result.before == nbytes == (tmp_path / "given.safetensors").stat().st_size
    assert save_detector(result.detector, tmp_path / "pruned.safetensors") <= 0.7 * nbytes


def test_a_budget_of_all_leaves_the_given_detector_as_it_was(images: list[TrainingImage]) -> None:
    teacher = tiny_detector()
    before = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    whole = PruneSettings(
        Budget("macs", 1.0, True), steps=1, branch_factor=1.0, step_recipe=SHORT, recipe=SHORT
    )
    result = prune(teacher, images, whole)
    assert result.after == result.before
    after = teacher.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
