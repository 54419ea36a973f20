"""FitReport: what was chosen, measured and written."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from modicum.fit.fit_plan import FitPlan
from modicum.fit.loss import Check
from modicum.fit.probe import Errors
from modicum.fit.settings import FitSettings, Target
from modicum.kv.cache_settings import CacheSettings
from modicum.kv.head_profile import HeadProfile


@dataclass
class Measured:
    """A plan, assembled and measured."""

    plan: FitPlan
    errors: Errors
    loss: float


@dataclass
class FitReport:
    """What was done.

    Attributes:
        plan: that was taken.
        errors: of the model that was written, on the probes.
        loss: of them.
        dense_nbytes: of the model as it was, with transformers' whole cache.
        check: of the predictor.
        candidates: plans that were assembled and measured, the best first.
        in_order: whether the weights are those of pruning in order, not the library's.
        variants: each part's errors and bytes at its options.
        left_out: options whose errors were not numbers.
    """

    target: Target
    settings: FitSettings
    plan: FitPlan
    errors: Errors
    loss: float
    dense_nbytes: int
    weights_nbytes: int
    cache_nbytes: int
    check: Check
    candidates: list[Measured]
    in_order: bool
    variants: list[dict[str, Any]]
    left_out: list[str]
    probe_length: int
    library: str
    seconds: float = 0.0
    file_bytes: int = 0
    before_finetuning: float | None = None
    after_finetuning: float | None = None
    masks: dict[str, Tensor] = field(default_factory=dict, repr=False)
    profile: HeadProfile | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        """Of weights and caches, as a run holds them."""
        return self.weights_nbytes + self.target.batch * self.cache_nbytes

    @property
    def cache(self) -> CacheSettings:
        """Of a run."""
        return CacheSettings(self.settings.policy, f"{self.cache_nbytes} B", self.plan.cache.store)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "memory": self.target.nbytes,
            "context": self.target.context,
            "batch": self.target.batch,
            "settings": asdict(self.settings),
            "plan": self.plan.to_dict(),
            "errors": self.errors.to_dict(),
            "loss": self.loss,
            "bytes": self.nbytes,
            "dense_bytes": self.dense_nbytes,
            "weights_bytes": self.weights_nbytes,
            "cache_bytes": self.cache_nbytes,
            "file_bytes": self.file_bytes,
            "predictor": {k: v for k, v in asdict(self.check).items() if v == v},
            "candidates": [
                {**m.plan.to_dict(), "loss": m.loss, "errors": m.errors.to_dict()} for m in self.candidates
            ],
            "pruned_in_order": self.in_order,
            "variants": self.variants,
            "left_out": self.left_out,
            "probe_length": self.probe_length,
            "library": self.library,
            "seconds": self.seconds,
            "loss_before_finetuning": self.before_finetuning,
            "loss_after_finetuning": self.after_finetuning,
        }
