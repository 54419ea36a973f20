"""Prune: a trained detector becomes one that keeps a budget, in steps with training between them.

The pipeline of arXiv 1905.01787 (fixed deletion in the branches, automatic pruning, guidance) in an order
that is ours: branches are deleted first, so that one budget is for the whole network.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from modicum.errors import InputError, ModelError
from modicum.search.network import fingerprint
from modicum.vision.detect.augment import NONE
from modicum.vision.detect.deletion import delete_branch_channels, highest
from modicum.vision.detect.detector import Detector
from modicum.vision.detect.detector_file import load_detector, save_detector
from modicum.vision.detect.guidance import GuidanceSettings, Guide
from modicum.vision.detect.loaded_images import Progress, TrainingImage, images_digest
from modicum.vision.detect.pruning.budget import Budget, CostModel
from modicum.vision.detect.pruning.channel_graph import kept_network
from modicum.vision.detect.pruning.channel_scores import Score, channel_scores, check_score
from modicum.vision.detect.pruning.greedy import Allocation, greedy_channels
from modicum.vision.detect.pruning.sensitivity import knapsack_channels, sensitivities
from modicum.vision.detect.recipe import Recipe
from modicum.vision.detect.ssd import SSD
from modicum.vision.detect.ssd_settings import smallest
from modicum.vision.detect.training import DetectorTraining, training_checkpoint
from modicum.whole_file import write_whole

Allocator = Literal["greedy", "knapsack"]
_BATCHES = 8
_SENSITIVITY_BATCHES = 4
_NO_CUT = 1.0
_RUN = "run.json"


@dataclass(frozen=True)
class PruneSettings:
    """How a detector is pruned.

    Attributes:
        budget: what it may take in the end.
        score: which channels of a group go first: magnitude, taylor or bn.
        allocator: how many of each group: "greedy" by scores over all groups, "knapsack" by sensitivity.
        is_per_cost: greedy divides a group's lost share of scores by what a cut saves, which cuts wide groups
            most.
        steps: how often it is cut, each time to an equal share of what was left, on a logarithmic scale.
        max_ratio: of a group's channels that may go in all.
        branch_factor: share of inner channels of extra layers and heads that stay, cut before the first
            step; 1 for no such deletion.
        prunes_branches: whether the steps may cut in extra layers and heads, too.
        step_recipe: the training after each step but the last.
        recipe: the training at the end.
        guidance: what is learned from the unpruned detector; None for nothing.

    Raises:
        InputError: a value is out of range.
    """

    budget: Budget
    score: Score = "taylor"
    allocator: Allocator = "greedy"
    is_per_cost: bool = False
    steps: int = 4
    max_ratio: float = 0.8
    branch_factor: float = 0.5
    prunes_branches: bool = False
    step_recipe: Recipe = field(default_factory=lambda: Recipe(epochs=2, learning_rate=4e-3))
    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=20, learning_rate=4e-3))
    guidance: GuidanceSettings | None = field(default_factory=GuidanceSettings)

    def __post_init__(self) -> None:
        check_score(self.score)
        if self.allocator not in ("greedy", "knapsack"):
            raise InputError(f"the allocator is {self.allocator!r}: choose greedy or knapsack")
        if self.steps < 1:
            raise InputError(f"steps is {self.steps}: give 1 or more")
        if not 0 < self.max_ratio < 1:
            raise InputError(f"max_ratio is {self.max_ratio}: give a share above 0 and below 1")
        if not 0 < self.branch_factor <= 1:
            raise InputError(f"branch_factor is {self.branch_factor}: give a share above 0 and at most 1")

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


@dataclass(frozen=True)
class PruneResult:
    """What pruning gave."""

    detector: Detector
    before: float
    """What the given detector takes of the budget's resource."""
    limit: float
    after: float
    """A time is measured once more at the end."""
    channels_before: dict[str, int]
    losses: list[float] = field(repr=False)
    """Of the last training's steps."""


@dataclass
class _Pruning:
    """What the steps share."""

    teacher: Detector
    images: Sequence[TrainingImage]
    settings: PruneSettings
    state: Path | None
    progress: Progress | None
    basis: Any

    def train(self, network: SSD, recipe: Recipe, name: str) -> list[float]:
        guidance, guide = self.settings.guidance, None
        if guidance is not None:
            guide = Guide.seeded(self.teacher.network, network, guidance, recipe.seed)
        checkpoint = None
        if self.state is not None:
            checkpoint = training_checkpoint(
                self.state / f"{name}.training", self.basis, name, dict(network.settings.channels)
            )
        return DetectorTraining(
            network, self.images, recipe, guide, checkpoint, f"training after {name}"
        ).run(self.progress)

    def step(self, network: SSD, model: CostModel, least: Mapping[str, int], limit: float) -> SSD:
        """Cut to a limit."""
        settings = self.settings
        channels = network.settings.channels
        if model.cost(channels) <= limit:
            return network
        batches = DetectorTraining(
            network, self.images, replace(settings.step_recipe, augment=NONE, epochs=_BATCHES)
        )
        some = [batches.batch(number) for number in range(_BATCHES)]
        scores = channel_scores(network, settings.score, some)
        allocation = Allocation(channels, least, model)
        if settings.allocator == "greedy":
            wanted = greedy_channels(allocation, scores, limit, settings.is_per_cost)
        else:
            inputs: list[Tensor] = [images for images, _ in some[:_SENSITIVITY_BATCHES]]
            allocation.check(limit)
            ratios = sensitivities(network, allocation, scores, inputs, self.progress)
            wanted = knapsack_channels(allocation, ratios, limit)
        kept = {name: highest(scores[name], wanted[name]) for name in least if wanted[name] < channels[name]}
        return kept_network(network, kept)


def prune(
    teacher: Detector,
    images: Sequence[TrainingImage],
    settings: PruneSettings,
    *,
    state: Path | None = None,
    progress: Progress | None = None,
) -> PruneResult:
    """Prune a detector to a budget and train it.

    Args:
        teacher: stays as it is.
        images: to learn from; what the teacher was trained on serves.
        settings: how.
        state: a folder of a run that may be stopped, and then goes on; None for none. It is the caller's to
            remove.
        progress: called with what is done, how much of it, and of how much.

    Raises:
        InputError: the budget is under the smallest network or above the detector, or the state is of another
            run.
        ModelError: the network cannot be pruned, a loss is not a number, or a file cannot be written.
    """
    if "quantized" in teacher.about:
        raise ModelError("an int8 detector cannot be pruned: prune the float one, then quantise")
    whole = dict(teacher.network.settings.channels)
    about = {**teacher.about, "pruned": {**settings.to_dict(), "from_channels": whole}}
    model = CostModel(teacher.network.settings, settings.budget.resource, about)
    basis = [settings.to_dict(), whole, fingerprint(teacher.network), images_digest(images)]
    stopped = _costs_of_stopped_run(state, basis)
    if stopped is None:
        # The given file says less of itself than the pruned one will.
        given = replace(model, about=teacher.about) if settings.budget.resource == "bytes" else model
        before = given.cost(whole)
    else:
        before, start = stopped
    limit = settings.budget.absolute(before)
    if limit > before:
        raise InputError(
            f"the budget is {model.describe(limit)} and the detector takes {model.describe(before)} already: "
            "give less"
        )
    work = _Pruning(teacher, images, settings, state, progress, [*basis, before])
    network = copy.deepcopy(teacher.network)
    if settings.branch_factor < _NO_CUT:
        network = delete_branch_channels(network, settings.branch_factor)
    prunable = teacher.network.settings.backbone_groups
    if settings.prunes_branches:
        prunable += teacher.network.settings.branch_groups
    least = {
        name: min(network.settings.channels[name], smallest(whole[name], settings.max_ratio))
        for name in prunable
    }
    Allocation(network.settings.channels, least, model).check(limit)
    if stopped is None:
        start = model.cost(network.settings.channels)
        if state is not None:
            _begin(state, basis, before, start)
    for step in range(1, settings.steps + 1):
        done = None if state is None else state / f"step-{step}.safetensors"
        if done is not None and done.exists():
            network = load_detector(done).network
            continue
        # Kept before it is trained: with other measured times the same step would cut otherwise.
        cut = None if state is None else state / f"cut-{step}.safetensors"
        if cut is not None and cut.exists():
            network = load_detector(cut).network
        else:
            target = limit if step == settings.steps else start * (limit / start) ** (step / settings.steps)
            network = work.step(network, model, least, max(target, limit))
            if cut is not None:
                save_detector(Detector(network), cut)
        if step < settings.steps:
            work.train(network, settings.step_recipe, f"step {step}")
        if done is not None:
            save_detector(Detector(network), done)
    losses = work.train(network, settings.recipe, "the last cut")
    is_time = settings.budget.resource == "latency"
    last = CostModel(network.settings, "latency") if is_time else model  # measures anew
    after = last.cost(network.settings.channels)
    if is_time and after > limit:
        warnings.warn(
            f"measured again, the pruned detector takes {model.describe(after)}, more than the budget of "
            f"{model.describe(limit)}: leave the machine alone meanwhile, or give a smaller budget",
            stacklevel=2,
        )
    return PruneResult(Detector(network.eval(), about), before, limit, after, whole, losses)


def _costs_of_stopped_run(state: Path | None, basis: Any) -> tuple[float, float] | None:
    """What the given detector took when a run that was stopped began, and what it took with its branches cut;
    None if there is no such run.

    A time is never measured twice alike, so the limits of a run that goes on are those of its beginning.

    Raises:
        InputError: the run was another.
    """
    if state is None:
        return None
    path = state / _RUN
    if not path.is_file():
        _check_free(state)
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        is_same = told["basis"] == json.loads(json.dumps(basis, default=str))
        costs: tuple[float, float] = told["before"], told["start"]  # whole numbers but for times
        if not all(0 < cost < math.inf for cost in costs):
            raise ValueError(f"before and start are {costs}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}): remove {state} to begin anew") from error
    if not is_same:
        raise InputError(
            f"{state} is of a run with another detector, data or settings: repeat those to go on, give "
            "another --out, or remove it to begin anew"
        )
    return costs


def _check_free(state: Path) -> None:
    """Raise if files of others would be among those of a run.

    Raises:
        InputError: the path is a file, or a folder with more than the beginning of a run.
    """
    try:
        is_free = not state.exists() or all(path.name.startswith(_RUN) for path in state.iterdir())
    except OSError:
        is_free = False
    if not is_free:
        raise InputError(f"{state} is there and is not of a pruning: remove it, or give another --out")


def _begin(state: Path, basis: Any, before: float, start: float) -> None:
    """Claim a folder for a run."""
    path = state / _RUN
    try:
        state.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"basis": basis, "before": before, "start": start}, default=str))
    except OSError as error:
        raise ModelError(f"cannot write to {state}: {error.strerror or error}; give another --out") from error
