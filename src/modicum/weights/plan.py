"""Plan: how to prune, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from modicum.errors import InputError
from modicum.weights.dsnot import DSnoT
from modicum.weights.pattern import Blocks, Groups, Pattern, Rows, Whole, parse_pattern
from modicum.weights.scores import SCORES
from modicum.weights.swap import Swap

REFINERS: dict[str, DSnoT | Swap] = {
    "dsnot": DSnoT(),
    "dsnot-guarded": DSnoT.guard(),
    "dsnot-paper": DSnoT.paper(),
    "swap": Swap(),
}
UPDATES = ("none", "obs", "lsq")
_UPDATE = {"sparsegpt": "obs", "alps": "lsq"}
"""Where none is asked for; both methods read the Gram matrix."""

_NEXT_TO_NONE = 1e-9
"""Removes no weight of a layer, as a share of 0 does that patterns refuse."""


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
                f"layers={self.layers!r} gives blocks unequal shares, and {self.pattern} is an equal one: "
                f'give layers="uniform", or sparsity={self.pattern.sparsity:.9g} without a pattern'
            )
        if isinstance(self.refine, DSnoT) and isinstance(self.pattern, Blocks):
            raise InputError(
                f"DSnoT moves single weights, and the pattern removes blocks of {self.pattern}: give "
                'refine="swap" or refine="none"'
            )
        if self.bias_correct and isinstance(self.refine, DSnoT) and not self.refine.guarded:
            raise InputError(
                "bias_correct makes the expected error zero, and lowering it is all that DSnoT does: give "
                'bias_correct=False, or refine="swap" or refine="dsnot-guarded"'
            )

    @property
    def needs_gram(self) -> bool:
        """Whether a step of it reads the Gram matrix."""
        guarded = isinstance(self.refine, Swap) or (isinstance(self.refine, DSnoT) and self.refine.guarded)
        return guarded or self.method in _UPDATE or self.update != "none"

    def at(self, sparsity: float) -> Pattern:
        """The pattern for a block that loses this share, which may be none."""
        sparsity = max(sparsity, _NEXT_TO_NONE)
        if isinstance(self.pattern, Blocks):
            return Blocks(self.pattern.height, self.pattern.width, sparsity)
        return type(self.pattern)(sparsity) if isinstance(self.pattern, Rows) else self.pattern


def plan(
    method: str = "wanda",
    refine: str | DSnoT | Swap | None = "dsnot",
    sparsity: float | None = None,
    pattern: str | None = None,
    update: str | None = None,
    layers: str = "uniform",
    where: Literal["all", "attention"] = "all",
    bias_correct: bool = False,
    scope: Literal["row", "layer"] = "row",
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
        raise InputError(
            'nothing says how much to remove: give sparsity=0.6, pattern="2:4", or a budget for the file '
            'such as budget="120MiB"'
        )
    if scope not in ("row", "layer"):
        raise InputError(f"scope is {scope!r}; choose one of row, layer")
    if pattern is None and sparsity is not None:
        form: Pattern = Rows(sparsity) if scope == "row" else Whole(sparsity)
    elif scope == "layer":
        raise InputError(
            f"scope='layer' ranks all weights of a layer, and pattern {pattern} those of each group: give "
            'scope="row", or a sparsity without a pattern'
        )
    else:
        form = parse_pattern(pattern or "", sparsity)
    update = update or _UPDATE.get(method, "none")
    return Plan(form, method, refine, update, layers, where, bias_correct)
