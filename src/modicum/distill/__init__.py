"""Distillation: a student learns from the most probable classes of a teacher, recorded once.

After "Essence Knowledge Distillation for Speech Recognition" (Yang et al. 2019, arXiv 1906.10834), of which
we could read the abstract: what it leaves open is our reading, and each file says so. The names below load
when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modicum.lazy_names import lazy_names

if TYPE_CHECKING:
    from modicum.distill.code import ProbabilityCode
    from modicum.distill.ctc import CTCBatch, CTCFrames, ctc_essence_loss
    from modicum.distill.ensemble import Ensemble
    from modicum.distill.entry import DistillReport, DistillSettings, distill
    from modicum.distill.essence import Essence, SoftTarget
    from modicum.distill.header import TargetsHeader
    from modicum.distill.loss import essence_loss
    from modicum.distill.recording import record
    from modicum.distill.rule import Mass, Threshold, TopK, parse_rule
    from modicum.distill.student import Student
    from modicum.distill.targets import SparseTargets, TargetsStatistics
    from modicum.distill.training import TrainingSettings, train
    from modicum.distill.writer import TargetsWriter

_HOMES = {
    "code": ("ProbabilityCode",),
    "ctc": ("CTCBatch", "CTCFrames", "ctc_essence_loss"),
    "ensemble": ("Ensemble",),
    "entry": ("DistillReport", "DistillSettings", "distill"),
    "essence": ("Essence", "SoftTarget"),
    "header": ("TargetsHeader",),
    "loss": ("essence_loss",),
    "recording": ("record",),
    "rule": ("Mass", "Threshold", "TopK", "parse_rule"),
    "student": ("Student",),
    "targets": ("SparseTargets", "TargetsStatistics"),
    "training": ("TrainingSettings", "train"),
    "writer": ("TargetsWriter",),
}

__all__ = [  # noqa: RUF022  # in the order of the reader's interest
    "distill",
    "DistillSettings",
    "DistillReport",
    "TopK",
    "Threshold",
    "Mass",
    "parse_rule",
    "Essence",
    "SoftTarget",
    "essence_loss",
    "ctc_essence_loss",
    "CTCBatch",
    "CTCFrames",
    "Ensemble",
    "SparseTargets",
    "TargetsStatistics",
    "TargetsHeader",
    "TargetsWriter",
    "ProbabilityCode",
    "record",
    "Student",
    "TrainingSettings",
    "train",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, globals())
