"""HeadProfile: how many of its tokens each KV head of a model needs, measured once per model.

The measure is ours; it stands on KVzip's observation (Kim et al. 2025, arXiv 2505.23416) that the tokens a
model attends to while it repeats a text are those that it needs for any question about the text. For a share
f of all tokens of all heads, a head's share is the part of its tokens that is among those most attended to.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modicum.errors import BudgetError, InputError, SnapshotError
from modicum.kv.few_sizes import few_sizes
from modicum.kv.token_regression import TokenRegression
from modicum.whole_file import whole_file

SUFFIX = ".safetensors"
_FORMAT, _VERSION, _KEY = "modicum head profile", 2, "modicum"
_READABLE = (1, 2)  # 1 has no regression

_SIZES = (
    4,
    12,
)  # least and most sizes of heads: those of one size are scored together, and each takes its time
_HEADS_A_SIZE = 8
Table = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class HeadProfile:
    """Shares of tokens per KV head, for several shares of all tokens.

    Raises:
        InputError: tables of unequal shape, shares that are no numbers from 0 to 1, fractions out of order.
    """

    fractions: tuple[float, ...]
    """F shares of all tokens of all heads, ascending, between 0 and 1."""
    shares: tuple[Table, ...]
    """[F][layers][KV heads]: the part of a head's tokens among them, from 0 to 1."""
    skipped: tuple[int, ...] = ()
    """Layers without full attention; their shares mean nothing."""
    weights: str = ""
    """Digest of the weights that it was measured with (`modicum.kv.fingerprint.weights_digest`)."""
    model: str = ""
    model_type: str = ""
    texts: int = 0
    """Texts that it was measured on."""
    tokens: int = 0
    """Tokens of all those texts."""
    regression: TokenRegression | None = None
    """Of token scores, for the policy `learned`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "fractions", tuple(float(f) for f in self.fractions))
        tables = tuple(tuple(tuple(float(x) for x in row) for row in table) for table in self.shares)
        object.__setattr__(self, "shares", tables)
        object.__setattr__(self, "skipped", tuple(int(i) for i in self.skipped))
        f = self.fractions
        if not f or list(f) != sorted(set(f)) or not 0 < f[0] <= f[-1] < 1:
            raise InputError(f"head profile: the fractions are {list(f)}; give ascending ones from 0 to 1")
        if len(f) != len(tables) or len({tuple(map(len, table)) for table in tables}) != 1:
            raise InputError("head profile: the tables of shares differ in shape")
        if not all(0 <= x <= 1 for table in tables for row in table for x in row):
            raise InputError("head profile: not every share is a number from 0 to 1")

    @property
    def heads(self) -> tuple[int, ...]:
        """KV heads of each layer."""
        return tuple(len(row) for row in self.shares[0])

    def check(self, heads: Sequence[int], weights: str = "") -> None:
        """Raise unless the profile is of a model with these KV heads in each layer, and of these weights.

        Raises:
            SnapshotError: it is of another model.
        """
        whose = f"the head profile of {self.model or 'a model'}"
        remedy = "calibrate this model (modicum calibrate)"
        if self.heads != tuple(heads):
            raise SnapshotError(
                f"{whose} with {list(self.heads)} KV heads per layer does not fit a model with "
                f"{list(heads)}: {remedy}"
            )
        if weights and self.weights and weights != self.weights:
            raise SnapshotError(f"{whose} was measured with other weights ({self.weights}): {remedy}")

    def at(self, fraction: float) -> Table:
        """[layers][KV heads]: shares at a fraction of all tokens; linear in its logarithm between those
        measured. Below the least measured they are those of the least; at 1 every share is 1.
        """
        if fraction >= 1:
            return tuple(tuple(1.0 for _ in row) for row in self.shares[0])
        if fraction <= self.fractions[0]:
            return self.shares[0]
        above = bisect_left(self.fractions, fraction)
        low, high = self.fractions[above - 1], (*self.fractions, 1.0)[above]
        tables = (*self.shares, self.at(1.0))
        t = (math.log(fraction) - math.log(low)) / (math.log(high) - math.log(low))
        return tuple(
            tuple((1 - t) * a + t * b for a, b in zip(first, second, strict=True))
            for first, second in zip(tables[above - 1], tables[above], strict=True)
        )

    def capacities(
        self, tokens: int, fraction: float, least: int, layers: Collection[int] | None = None
    ) -> list[list[int]]:
        """[layers][KV heads]: slots in proportion to the shares at `fraction`, none below `least`, rounded to
        a few sizes. They add up to `tokens` per head of `layers` (None: all that were not skipped), or to
        less by fewer than there are heads of one size. In other layers: `tokens`.

        Raises:
            BudgetError: `tokens` is below `least`.
        """
        if tokens < least:
            raise BudgetError(
                f"a budget of {tokens} tokens per KV head is too small for calibrated heads, each of which "
                f"needs at least {least}: give at least {least}"
            )
        among = [
            i for i in range(len(self.heads)) if (i not in self.skipped if layers is None else i in layers)
        ]
        at = [(i, j) for i in among for j in range(self.heads[i])]
        table = self.at(fraction)
        # A head that shows nothing at all has a share too, so that any total can be reached.
        weights = [max(table[i][j], 1e-6) for i, j in at]
        slots = dict(zip(at, _divide(weights, tokens * len(at), least), strict=True))
        return [[slots.get((i, j), tokens) for j in range(n)] for i, n in enumerate(self.heads)]

    def save(self, path: str | Path) -> None:
        """Write the profile (safetensors with a JSON header), whole or not at all.

        Raises:
            SnapshotError: the file cannot be written.
        """
        path = Path(path)
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "fractions": list(self.fractions),
            "heads": list(self.heads),
            "skipped": list(self.skipped),
            "weights": self.weights,
            "model": self.model,
            "model_type": self.model_type,
            "texts": self.texts,
            "tokens": self.tokens,
        }
        flat = [[x for row in table for x in row] for table in self.shares]
        tensors = {"shares": torch.tensor(flat)}
        if self.regression is not None:
            header["regression"] = {"is_unrotated": self.regression.is_unrotated}
            tensors |= self.regression.tensors
        try:
            with whole_file(path) as part:
                save_file(tensors, part, metadata={_KEY: json.dumps(header)})
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise SnapshotError(f"cannot write the head profile to {path}: {reason}") from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a saved profile.

        Raises:
            SnapshotError: the file is missing, truncated, foreign, or of a newer version.
        """
        remedy = "make it anew with modicum calibrate"
        if not Path(path).is_file():
            raise SnapshotError(f"there is no head profile at {path}: {remedy}")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(_KEY, "null"))
                if not isinstance(header, dict) or header.get("format") != _FORMAT:
                    raise SnapshotError(f"{path} does not hold a head profile: {remedy}")
                if header.get("version") not in _READABLE:
                    raise SnapshotError(
                        f"{path} has version {header.get('version')!r}, this modicum reads up to {_VERSION}: "
                        f"update modicum, or {remedy}"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            shares = _tables(tensors.pop("shares"), header["heads"])
            how = header.pop("regression", None)
            regression = None if how is None else TokenRegression.of(tensors, how["is_unrotated"])
            return cls(shares=shares, regression=regression, **_fields(header))
        except (SafetensorError, OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise SnapshotError(
                f"{path} is truncated or no head profile at all ({error}): {remedy}"
            ) from error
        except (InputError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise SnapshotError(f"{path} is damaged ({error}): {remedy}") from error


def _tables(shares: Tensor, heads: list[int]) -> tuple[Table, ...]:
    """[F][layers][KV heads] of [F, heads of all layers]."""
    rows = torch.split(shares.double(), heads, dim=1)
    return tuple(tuple(tuple(row[f].tolist()) for row in rows) for f in range(len(shares)))


def _fields(header: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in header.items() if key not in ("format", "version", "heads")}


def _divide(weights: Sequence[float], total: int, least: int) -> list[int]:
    """Whole numbers in proportion to weights, none below `least`, of few sizes, for a total of at least
    `least` each.
    """
    free = set(range(len(weights)))
    while True:
        # Those that would get less than the least get the least; the others share what that leaves.
        scale = (total - least * (len(weights) - len(free))) / sum(weights[i] for i in free) if free else 0.0
        below = {i for i in free if weights[i] * scale < least}
        if not below:
            break
        free -= below
    exact = [max(float(least), weights[i] * scale) for i in range(len(weights))]
    sizes = min(max(len(weights) // _HEADS_A_SIZE, _SIZES[0]), _SIZES[1])
    return few_sizes(exact, total, sizes, least)
