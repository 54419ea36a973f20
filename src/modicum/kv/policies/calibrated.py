"""Calibrated head budgets: each KV head gets the share of slots that a calibration of the model measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from modicum.errors import PolicyError
from modicum.kv.head_profile import HeadProfile
from modicum.kv.policies.razor import RazorAttention
from modicum.kv.policy import Divider, Policy, check_between
from modicum.kv.registry import alias, register

DEFAULT_FRACTION = 0.125
"""Of the tokens that are kept, where neither the setting nor the length of the text says it."""


@register
@dataclass(frozen=True)
class Calibrated(Divider):
    """Slots per head and layer from a `HeadProfile`; the base scores the tokens.

    Ours. Heads that carry retrieval get many times the slots of the others; `modicum.calibrate` measures who
    they are, once per model. RazorAttention's two kinds of heads are the special case of two levels.
    """

    name: ClassVar[str] = "calibrated"
    title: ClassVar[str] = "Calibrated head budgets"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.23416"  # KVzip, whose scores the profile is made of
    summary: ClassVar[str] = "Each KV head holds the share of slots that a calibration of the model measured."

    profile: str | None = None
    """File of a saved profile; None: the one that is known for the model's weights."""
    fraction: float | None = None
    """Share of tokens for which to read the profile; None: budget / length of the text where that is known,
    else 1/8."""
    otherwise: Policy | None = None
    """What stands in where the model has no profile; as the base, where its profile has no regression and the
    base needs one. None: such models are refused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.profile is not None and not isinstance(self.profile, str):
            raise PolicyError(
                f"calibrated: profile is {self.profile!r}; it is the path of a profile, or None"
            )
        if self.otherwise is not None and not isinstance(self.otherwise, Policy):
            raise PolicyError(
                f"calibrated: otherwise is {self.otherwise!r}; it is a policy, such as manifoldkv, or None"
            )
        if self.fraction is not None:
            check_between(self, 0, 1, fraction=self.fraction)
        for base in (self.base, self.otherwise):
            if base is not None:
                _check_base(base)

    def settled(self, has_profile: bool, has_regression: bool) -> Policy:
        """What serves a model, by what its calibration has; itself where it has all that is needed."""
        if self.otherwise is None:
            return self
        if not has_profile:
            return self.otherwise
        base = self.otherwise if self.base.needs_regression and not has_regression else self.base
        return replace(self, base=base, otherwise=None)

    def per_head(self) -> Policy:
        raise PolicyError(
            f"{self} divides the budget of the whole model, so it cannot be the base of another policy: "
            "write it first, as in 'calibrated+caote+snapkv'"
        )

    def head_budgets(
        self, profile: HeadProfile, tokens: int, least: int, length: int | None, layers: list[int]
    ) -> list[list[int]]:
        """[layers][KV heads]: slots of the given layers' heads, `tokens` on average, none below `least`.

        length: tokens of the text to be read, if known.
        """
        fraction = self.fraction
        if fraction is None:
            fraction = tokens / length if length else DEFAULT_FRACTION
        return profile.capacities(tokens, fraction, least, layers)


def _check_base(base: Policy) -> None:
    """Raise unless it does nothing but score tokens."""
    for what, divides in (
        ("heads", base.head_shares() is not None or isinstance(base, RazorAttention | Calibrated)),
        ("layers", len(set(base.layer_budgets(64, 4, 1))) > 1),
    ):
        if divides:
            raise PolicyError(
                f"calibrated: {base} divides the budget over {what} by itself; give a base that only scores, "
                "such as 'keydiff'"
            )
    if not base.evicts:
        raise PolicyError(f"calibrated: {base} never evicts, so there is no budget to divide")


alias("auto", "calibrated(base=learned,otherwise=manifoldkv)")  # the best of docs/experiments/budgets.md
