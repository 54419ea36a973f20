"""Digest of what a policy reads of a model's heads, on which errors of caches depend."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from transformers import PreTrainedModel

from modicum.kv.head_profile import HeadProfile
from modicum.kv.head_store import find_profile, head_scores
from modicum.kv.heads import HeadScores
from modicum.kv.policies.calibrated import Calibrated
from modicum.kv.policies.razor import RazorAttention
from modicum.kv.policy import Policy


def heads_digest(model: PreTrainedModel, policy: Policy) -> str:
    """16 hex digits that stand for the head profile and the head scores that a policy reads; "" if it reads
    none.

    Their numbers count, not the names and digests that they carry.

    Raises:
        SnapshotError: the policy names a file that cannot be read.
    """
    read: list[Any] = []
    if isinstance(policy, Calibrated) or policy.needs_regression:
        path = policy.profile if isinstance(policy, Calibrated) else None
        profile = find_profile(model) if path is None else HeadProfile.load(path)
        if profile is not None:
            checksum = None if profile.regression is None else profile.regression.checksum
            read += [profile.fractions, profile.shares, profile.skipped, checksum]
    if isinstance(policy, RazorAttention):
        scores = head_scores(model) if policy.heads is None else HeadScores.load(policy.heads)
        read += [scores.echo, scores.induction, scores.skipped]
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()[:16] if read else ""
