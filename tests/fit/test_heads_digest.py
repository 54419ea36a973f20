"""What errors of caches depend on beside the weights: the head profile, or the head scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from modicum.fit.heads_digest import heads_digest
from modicum.kv.head_profile import HeadProfile
from modicum.kv.head_store import use_head_scores, use_profile
from modicum.kv.heads import HeadScores
from modicum.kv.registry import parse_policy
from tests.fit.fitting import tiny

LAYERS, HEADS = 5, 4


def profile(seed: int) -> HeadProfile:
    draw = torch.Generator().manual_seed(seed)
    tables = torch.rand(2, LAYERS, HEADS, generator=draw)
    return HeadProfile((0.1, 0.5), tables.tolist())


def test_another_profile_has_another_digest_and_another_name_has_not() -> None:
    model, _ = tiny()
    policy = parse_policy("calibrated+keydiff")
    found = []
    for one in (profile(0), profile(1), replace(profile(0), model="another name", texts=3)):
        use_profile(model, one)
        found.append(heads_digest(model, policy))
    assert found[0] == found[2] != found[1]


def test_a_profile_in_a_file_is_read(tmp_path: Path) -> None:
    model, _ = tiny()
    path = tmp_path / "heads.safetensors"
    policy = parse_policy(f"calibrated(base=keydiff,profile='{path}')")
    found = []
    for seed in (0, 1):
        profile(seed).save(path)
        found.append(heads_digest(model, policy))
    assert found[0] != found[1]


def test_head_scores_count_where_the_policy_reads_them() -> None:
    model, _ = tiny()
    policy = parse_policy("razorattention")
    found = []
    for value in (0.25, 0.5):
        table = torch.full((LAYERS, HEADS), value)
        use_head_scores(model, HeadScores(table.tolist(), table.tolist()))
        found.append(heads_digest(model, policy))
    assert found[0] != found[1]


def test_a_policy_that_reads_none_has_none() -> None:
    model, _ = tiny()
    use_profile(model, profile(0))
    assert heads_digest(model, parse_policy("keydiff")) == ""
