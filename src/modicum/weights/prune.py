"""Prune: a model's linear layers to a budget, decoder block by decoder block."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modicum.errors import InputError
from modicum.weights import dsnot, layers, swap
from modicum.weights.blocks import Block, Inputs, Matrix, Passes, blocks_of, one_by_one
from modicum.weights.dsnot import DSnoT
from modicum.weights.pattern import Blocks, Groups, Pattern, Rows, parse_pattern
from modicum.weights.scores import SCORES, score, wanda
from modicum.weights.solve import least_squares, sweep
from modicum.weights.state import State
from modicum.weights.statistics import WIDE, Statistics
from modicum.weights.swap import Swap

REFINERS: dict[str, DSnoT | Swap] = {
    "dsnot": DSnoT(),
    "dsnot-guarded": DSnoT.guard(),
    "dsnot-paper": DSnoT.paper(),
    "swap": Swap(),
}
UPDATES = ("none", "obs", "lsq")
OUTLIER = 5.0
"""m of OWL: a score is an outlier above so many times the mean."""


@dataclass(frozen=True)
class Plan:
    """How to prune, checked.

    Raises:
        InputError: a value that is not known, or two that do not go together.
    """

    pattern: Pattern
    method: str = "wanda"
    refine: DSnoT | Swap | None = None
    update: str = "none"
    layers: str = "uniform"
    where: Literal["all", "attention"] = "all"
    """Which linear layers are refined."""
    bias_correct: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("method", self.method, SCORES),
            ("update", self.update, UPDATES),
            ("layers", self.layers, ("uniform", "owl", "atp")),
            ("where", self.where, ("all", "attention")),
        ):
            if value not in known:
                raise InputError(f"{name} is {value!r}; choose one of {', '.join(known)}")
        if self.layers != "uniform" and isinstance(self.pattern, Groups):
            raise InputError(
                f"layers={self.layers!r} gives blocks unequal shares, {self.pattern} an equal one"
            )
        if isinstance(self.refine, DSnoT) and isinstance(self.pattern, Blocks):
            raise InputError(
                f"DSnoT moves single weights, the pattern is {self.pattern}: refine by swap instead"
            )
        if self.bias_correct and isinstance(self.refine, DSnoT) and not self.refine.guarded:
            raise InputError(
                "bias_correct makes the expected error zero, and lowering it is all that DSnoT does"
            )

    @property
    def needs_gram(self) -> bool:
        """Whether a step of it reads the Gram matrix."""
        guarded = isinstance(self.refine, Swap) or (isinstance(self.refine, DSnoT) and self.refine.guarded)
        return guarded or self.method == "sparsegpt" or self.update != "none"

    def at(self, sparsity: float) -> Pattern:
        """The pattern for a block that loses this share."""
        if isinstance(self.pattern, Blocks):
            return Blocks(self.pattern.height, self.pattern.width, sparsity)
        return Rows(sparsity) if isinstance(self.pattern, Rows) else self.pattern


@dataclass
class Layer:
    """What was done to one weight."""

    name: str
    block: int
    rows: int
    width: int
    kept: int
    sparsity: float
    tokens: int
    error_before: float | None
    """Share of the layer's mean squared output that is lost, by the mask as it was chosen."""
    error_refined: float | None
    error_after: float | None
    """After refinement and update."""
    changed: int
    """Weights that refinement brought back."""
    capped: int
    """Rows at which it might have gone on."""
    seconds: float


@dataclass
class PruneReport:
    """What was done to a model."""

    method: str
    refine: str | None
    update: str
    pattern: str
    layers: str
    sparsity: float
    """Asked for; the share of prunable weights removed."""
    shares: list[float]
    """Of each block."""
    table: list[Layer] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    """Of the process, as the system counts."""
    masks: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """By the parameters' names, True where kept."""

    @property
    def achieved(self) -> float:
        """The share of prunable weights that is gone."""
        total = sum(x.rows * x.width for x in self.table)
        return 1 - sum(x.kept for x in self.table) / total if total else 0.0

    @property
    def error(self) -> float | None:
        """Mean of the layers' errors."""
        errors = [x.error_after for x in self.table if x.error_after is not None]
        return sum(errors) / len(errors) if errors else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it; masks left out."""
        found = {name: value for name, value in asdict(self).items() if name != "masks"}
        return found | {"achieved": self.achieved, "error": self.error}


Progress = Callable[[str, int, int], None]
"""Told what is done, how many blocks are, and of how many."""


def plan(
    method: str = "wanda",
    refine: str | DSnoT | Swap | None = "dsnot",
    sparsity: float | None = None,
    pattern: str | None = None,
    update: str | None = None,
    layers: str = "uniform",
    where: Literal["all", "attention"] = "all",
    bias_correct: bool = False,
) -> Plan:
    """A plan from names.

    Raises:
        InputError: as `Plan`; neither sparsity nor pattern is given.
    """
    if isinstance(refine, str):
        if refine not in ("none", *REFINERS):
            raise InputError(f"refine is {refine!r}; choose one of none, {', '.join(REFINERS)}")
        where = "attention" if refine == "dsnot-paper" else where
        refine = REFINERS.get(refine)
    if pattern is None and sparsity is None:
        raise InputError('say how much is to go: sparsity=0.6, pattern="2:4" or a budget in bytes')
    form = (
        Rows(sparsity) if pattern is None and sparsity is not None else parse_pattern(pattern or "", sparsity)
    )
    update = update or ("obs" if method == "sparsegpt" else "none")
    return Plan(form, method, refine, update, layers, where, bias_correct)


def prune(
    model: PreTrainedModel,
    ids: Tensor,
    how: Plan,
    *,
    state: State | None = None,
    progress: Progress | None = None,
) -> PruneReport:
    """Prune the model in place.

    Args:
        ids: [n, T] calibration tokens, no pads.
        state: where each block's outcome is kept, so that a run that was stopped goes on.

    Raises:
        InputError: the pattern does not divide a layer, or its inputs are not finite (by the layer's name).
        ModelError: the model cannot be pruned.
    """
    started = time.perf_counter()
    blocks = blocks_of(model)
    training = model.training
    model.train(False)
    tell = progress or (lambda *_: None)
    try:
        with torch.no_grad(), one_by_one(model, blocks):
            shares = _shares(model, blocks, ids, how, tell)
            for block, share in zip(blocks, shares, strict=True):
                for matrix in block.matrices:
                    how.at(share).check(matrix.weight.shape[0], matrix.weight.shape[1], matrix.name)
            report = PruneReport(
                method=how.method,
                refine=None if how.refine is None else repr(how.refine),
                update=how.update,
                pattern=str(how.pattern),
                layers=how.layers,
                sparsity=how.pattern.sparsity,  # type: ignore[attr-defined]
                shares=shares,
                tokens=ids.numel(),
            )
            passes = Passes(model, blocks, ids)
            for number, block in enumerate(blocks):
                tell("pruning", number, len(blocks))
                done = None if state is None else state.load(number, block.matrices)
                if done is None:
                    gathered = _gather(passes, number, block, how)
                    done = [
                        _prune(m, gathered[m.name], how, how.at(shares[number]), number)
                        for m in block.matrices
                    ]
                    if state is not None:
                        state.save(number, block.matrices, done)
                for matrix, (row, mask) in zip(block.matrices, done, strict=True):
                    report.table.append(row)
                    report.masks[matrix.name] = mask
                passes.hidden = passes.through(number)
            tell("pruning", len(blocks), len(blocks))
    finally:
        model.train(training)
    report.masks = _by_parameter(report.masks)
    report.seconds = time.perf_counter() - started
    report.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return report


def _gather(passes: Passes, number: int, block: Block, how: Plan) -> dict[str, Statistics]:
    """Statistics of the inputs of each matrix of a block; those with one input share a set."""
    found: dict[str, Statistics] = {}
    leaders: dict[str, str] = {}

    def heard(matrix: Matrix, inputs: Tensor, again: str | None) -> None:
        leader = leaders.setdefault(matrix.name, again or matrix.name)
        if leader != matrix.name:
            return
        width = matrix.weight.shape[1]
        if matrix.name not in found:
            found[matrix.name] = Statistics(width, how.needs_gram or width <= WIDE, matrix.name)
        found[matrix.name].add(inputs)

    passes.through(number, Inputs(block.matrices, heard))
    out = {}
    for matrix in block.matrices:
        none = Statistics(matrix.weight.shape[1], True, matrix.name)
        out[matrix.name] = found.get(leaders.get(matrix.name, matrix.name), none)
    return out


def _prune(
    matrix: Matrix, inputs: Statistics, how: Plan, pattern: Pattern, block: int
) -> tuple[Layer, Tensor]:
    """Prune one weight in place: its row of the report, and its mask."""
    started = time.perf_counter()
    weight = matrix.weight
    known = inputs.tokens > 0
    began = score(how.method, weight, inputs)
    if isinstance(pattern, Blocks) and how.method in ("magnitude", "wanda"):
        began = began.square()
    refine = how.refine if known and (how.where == "all" or matrix.of_attention) else None
    if (
        how.method == "sparsegpt"
        and how.update == "obs"
        and refine is None
        and known
        and not isinstance(pattern, Blocks)
    ):
        moved, mask = sweep(weight, inputs, pattern)
        first, capped = mask, 0
    else:
        first = mask = pattern.select(began)
        capped = 0
        if isinstance(refine, DSnoT):
            mask = dsnot.refine(refine, weight, mask, inputs, began, pattern)
        elif isinstance(refine, Swap):
            by = Swap(refine.max_swaps, refine.tolerance, refine.work_bytes, how.bias_correct)
            swapped = swap.refine(by, weight, mask, inputs, pattern)
            mask, capped = swapped.mask, swapped.capped
        moved = torch.where(mask, weight.double(), 0.0)
        if how.update != "none" and known:
            again = sweep(weight, inputs, pattern, mask)[0] if how.update == "obs" else None
            moved = least_squares(weight, inputs, mask) if again is None else again
    before, refined, after = (
        relative_error(weight, sparse, inputs)
        for sparse in (torch.where(first, weight, 0.0), torch.where(mask, weight, 0.0), moved)
    )
    if how.bias_correct and matrix.bias is not None and known:
        lost = (weight.double() - moved.to(weight.device)) @ inputs.mean.to(weight.device)
        matrix.bias.data += lost.to(matrix.bias.dtype)
    weight.copy_(torch.where(mask, moved.to(weight.device), 0.0))
    row = Layer(
        name=matrix.name,
        block=block,
        rows=weight.shape[0],
        width=weight.shape[1],
        kept=int(mask.sum()),
        sparsity=1 - float(mask.float().mean()),
        tokens=inputs.tokens,
        error_before=before,
        error_refined=refined,
        error_after=after,
        changed=int((mask & ~first).sum()),
        capped=capped,
        seconds=time.perf_counter() - started,
    )
    return row, mask


def relative_error(weight: Tensor, sparse: Tensor, inputs: Statistics) -> float | None:
    """Σ e G eᵀ / Σ W G Wᵀ; None where the Gram matrix was not gathered or no token came by."""
    if inputs.tokens == 0 or not inputs.gram:
        return None
    matrix = inputs.matrix.to(weight.device, torch.float64)
    w, e = weight.double(), weight.double() - sparse.to(weight.device, torch.float64)
    whole = float(((w @ matrix) * w).sum())
    return float(((e @ matrix) * e).sum()) / whole if whole > 0 else 0.0


def _shares(
    model: PreTrainedModel, blocks: Sequence[Block], ids: Tensor, how: Plan, tell: Progress
) -> list[float]:
    """What each block loses."""
    sparsity: float = how.pattern.sparsity  # type: ignore[attr-defined]
    if how.layers == "uniform":
        return [sparsity] * len(blocks)
    sizes = [sum(m.weight.numel() for m in block.matrices) for block in blocks]
    if how.layers == "owl":
        passes, outliers = Passes(model, list(blocks), ids), []
        for number, block in enumerate(blocks):
            tell("looking at blocks", number, len(blocks))
            gathered = _gather(passes, number, block, Plan(how.pattern))
            scores = [wanda(m.weight, gathered[m.name]).flatten() for m in block.matrices]
            every = torch.cat(scores)
            outliers.append(float((every > OUTLIER * every.mean()).double().mean()))
            passes.hidden = passes.through(number)
        return layers.spread(layers.owl(outliers, sparsity), sizes, sparsity)
    return _by_perplexity(model, blocks, ids, how, sizes, tell)


def _by_perplexity(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    ids: Tensor,
    how: Plan,
    sizes: list[int],
    tell: Progress,
) -> list[float]:
    """ATP: the slope whose model reads best a slice of the calibration text that it was not pruned on."""
    if len(ids) < 4:
        raise InputError(
            f"layers='atp' needs 4 calibration sequences, one in 4 to tune on, or more; got {len(ids)}"
        )
    sparsity: float = how.pattern.sparsity  # type: ignore[attr-defined]
    held, rest = ids[: len(ids) // 4], ids[len(ids) // 4 :]
    dense = {m.name: m.weight.clone() for block in blocks for m in block.matrices}
    bias = {m.name: m.bias.data.clone() for block in blocks for m in block.matrices if m.bias is not None}
    best: tuple[float, list[float]] | None = None
    tries = layers.slopes(len(blocks), sparsity)
    for number, slope in enumerate(tries):
        tell("trying slopes", number, len(tries))
        shares = layers.spread(layers.atp(len(blocks), sparsity, slope), sizes, sparsity)
        passes = Passes(model, list(blocks), rest)
        try:
            for index, block in enumerate(blocks):
                gathered = _gather(passes, index, block, how)
                for m in block.matrices:
                    _prune(m, gathered[m.name], how, how.at(shares[index]), index)
                passes.hidden = passes.through(index)
            found = perplexity(model, held)
        finally:
            for block in blocks:
                for m in block.matrices:
                    m.weight.copy_(dense[m.name])
                    if m.bias is not None:
                        m.bias.data.copy_(bias[m.name])
        if best is None or found < best[0]:
            best = found, shares
    assert best is not None
    return best[1]


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: Tensor) -> float:
    """exp of the mean negative log-likelihood of each token but the first: ids [n, T], row by row."""
    total, count = 0.0, 0
    device = next(model.parameters()).device
    for row in ids:
        logits = model(row[None].to(device), use_cache=False).logits[0, :-1].float()
        goal = row[1:].to(device)
        total += float(torch.nn.functional.cross_entropy(logits, goal, reduction="sum"))
        count += len(goal)
    return math.exp(total / count)


def _by_parameter(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts' masks stacked under the name of the parameter that holds them."""
    found: dict[str, Tensor] = {}
    groups: dict[str, list[Tensor]] = {}
    for name, mask in masks.items():
        if name.endswith("]"):
            groups.setdefault(name[: name.rindex("[")], []).append(mask)
        else:
            found[name] = mask
    return found | {name: torch.stack(parts) for name, parts in groups.items()}
