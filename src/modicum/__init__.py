"""modicum: a language model's KV cache under a hard memory budget, and its weights pruned to one.

The names below are the public ones. They load when first used, so that `import modicum` is quick and patches
nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modicum.lazy_names import lazy_names

if TYPE_CHECKING:
    from modicum.errors import (
        BudgetError,
        CacheError,
        InputError,
        ModelError,
        ModicumError,
        PolicyError,
        SnapshotError,
        TargetsError,
    )
    from modicum.generation.generate import Generation, generate, prefill, stream
    from modicum.kv.budget import Budget
    from modicum.kv.cache import BudgetCache
    from modicum.kv.calibration import calibrate
    from modicum.kv.head_profile import HeadProfile
    from modicum.kv.policies.adakv import AdaKV
    from modicum.kv.policies.ahakv import AhaKV
    from modicum.kv.policies.calibrated import Calibrated
    from modicum.kv.policies.caote import CAOTE, FastCAOTE
    from modicum.kv.policies.compactor import Compactor
    from modicum.kv.policies.criticalkv import CriticalKV
    from modicum.kv.policies.full import Full
    from modicum.kv.policies.h2o import H2O
    from modicum.kv.policies.keydiff import KeyDiff
    from modicum.kv.policies.knorm import Knorm
    from modicum.kv.policies.learned import Learned
    from modicum.kv.policies.obcache import OBCache
    from modicum.kv.policies.pyramidkv import PyramidKV
    from modicum.kv.policies.random import Random
    from modicum.kv.policies.razor import RazorAttention
    from modicum.kv.policies.replay import Replay
    from modicum.kv.policies.snapkv import SnapKV
    from modicum.kv.policies.streaming import StreamingLLM
    from modicum.kv.policies.tova import TOVA
    from modicum.kv.policies.triattention import TriAttention
    from modicum.kv.policy import Policy, Wrapper
    from modicum.kv.registration import attach, detach
    from modicum.kv.registry import PolicyInfo, parse_policy, policies, register
    from modicum.kv.view import View
    from modicum.loading import embedded, load
    from modicum.texts import sample_text
    from modicum.weights.dsnot import DSnoT
    from modicum.weights.entry import prune
    from modicum.weights.prune import PruneReport
    from modicum.weights.swap import Swap

__version__ = "0.1.0"

_HOMES = {
    "errors": (
        "BudgetError",
        "CacheError",
        "InputError",
        "ModelError",
        "ModicumError",
        "PolicyError",
        "SnapshotError",
        "TargetsError",
    ),
    "generation.generate": ("Generation", "generate", "prefill", "stream"),
    "kv.registration": ("attach", "detach"),
    "kv.budget": ("Budget",),
    "kv.cache": ("BudgetCache",),
    "kv.calibration": ("calibrate",),
    "kv.head_profile": ("HeadProfile",),
    "kv.policies.adakv": ("AdaKV",),
    "kv.policies.ahakv": ("AhaKV",),
    "kv.policies.calibrated": ("Calibrated",),
    "kv.policies.caote": ("CAOTE", "FastCAOTE"),
    "kv.policies.compactor": ("Compactor",),
    "kv.policies.criticalkv": ("CriticalKV",),
    "kv.policies.full": ("Full",),
    "kv.policies.h2o": ("H2O",),
    "kv.policies.keydiff": ("KeyDiff",),
    "kv.policies.knorm": ("Knorm",),
    "kv.policies.learned": ("Learned",),
    "kv.policies.obcache": ("OBCache",),
    "kv.policies.pyramidkv": ("PyramidKV",),
    "kv.policies.random": ("Random",),
    "kv.policies.razor": ("RazorAttention",),
    "kv.policies.replay": ("Replay",),
    "kv.policies.snapkv": ("SnapKV",),
    "kv.policies.streaming": ("StreamingLLM",),
    "kv.policies.tova": ("TOVA",),
    "kv.policies.triattention": ("TriAttention",),
    "kv.policy": ("Policy", "Wrapper"),
    "kv.registry": ("PolicyInfo", "parse_policy", "policies", "register"),
    "kv.view": ("View",),
    "loading": ("embedded", "load"),
    "texts": ("sample_text",),
    "weights.dsnot": ("DSnoT",),
    "weights.entry": ("prune",),
    "weights.prune": ("PruneReport",),
    "weights.swap": ("Swap",),
}

__all__ = [  # noqa: RUF022  # in the order of the reader's interest
    "load",
    "BudgetCache",
    "Budget",
    "generate",
    "stream",
    "prefill",
    "Generation",
    "calibrate",
    "HeadProfile",
    "policies",
    "parse_policy",
    "PolicyInfo",
    "Policy",
    "Wrapper",
    "View",
    "register",
    "KeyDiff",
    "AhaKV",
    "CAOTE",
    "FastCAOTE",
    "RazorAttention",
    "Calibrated",
    "StreamingLLM",
    "H2O",
    "TOVA",
    "SnapKV",
    "OBCache",
    "Compactor",
    "Learned",
    "Replay",
    "TriAttention",
    "Knorm",
    "PyramidKV",
    "AdaKV",
    "CriticalKV",
    "Random",
    "Full",
    "prune",
    "PruneReport",
    "DSnoT",
    "Swap",
    "attach",
    "detach",
    "embedded",
    "sample_text",
    "ModicumError",
    "BudgetError",
    "PolicyError",
    "ModelError",
    "InputError",
    "CacheError",
    "SnapshotError",
    "TargetsError",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, globals())
