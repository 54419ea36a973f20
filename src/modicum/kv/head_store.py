"""Where measurements of a model's heads are kept: in memory, with the package, in the user's cache folder.

A file is named by the digest of the weights that it was measured with, so that a model finds its own and none
finds another's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from modicum.cache_folder import cache_folder
from modicum.errors import SnapshotError
from modicum.kv.attention_override import model_lock
from modicum.kv.fingerprint import weights_digest
from modicum.kv.head_profile import SUFFIX, HeadProfile
from modicum.kv.heads import HeadScores, probe

_SHIPPED = Path(__file__).parent.parent / "profiles"
_WORTH_KEEPING = 2  # seconds: a small model is probed again sooner than files of it pile up
T = TypeVar("T", HeadProfile, HeadScores)
_profiles: WeakKeyDictionary[PreTrainedModel, tuple[str, HeadProfile | None]] = WeakKeyDictionary()
_scores: WeakKeyDictionary[PreTrainedModel, HeadScores] = WeakKeyDictionary()


def folder() -> Path:
    """The user's folder of head profiles and head scores; need not exist."""
    return cache_folder() / "heads"


def profile_path(digest: str, where: Path | None = None) -> Path:
    """The file of the profile of weights with this digest: in the user's folder, or in another one."""
    return (where or folder()) / f"{digest}{SUFFIX}"


def find_profile(model: PreTrainedModel) -> HeadProfile | None:
    """The head profile of this model with its present weights, or None. A damaged file counts as none."""
    digest = weights_digest(model)
    known = _profiles.get(model)
    if known is not None and known[0] == digest:
        return known[1]
    found = None
    for place in (_SHIPPED, folder()) if digest else ():
        read = _read(HeadProfile.load, profile_path(digest, place))
        if read is not None and read.weights == digest:
            found = read
            break
    _profiles[model] = digest, found
    return found


def use_profile(model: PreTrainedModel, profile: HeadProfile) -> None:
    """Let `calibrated` policies use this profile for the model with its present weights."""
    digest = weights_digest(model)
    profile.check(profile.heads, digest)
    _profiles[model] = digest, profile


def keep_profile(model: PreTrainedModel, profile: HeadProfile) -> Path | None:
    """Remember a profile for this model and write it into the user's folder; None where that cannot be
    written, or the weights have no digest.
    """
    use_profile(model, profile)
    return _write(profile, profile_path(profile.weights)) if profile.weights else None


def head_scores(model: PreTrainedModel) -> HeadScores:
    """RazorAttention's scores of this model: known, read from the user's folder, or probed now (and kept)."""
    # Without the lock where they are known: nobody waits for another thread's probe of something else.
    if model not in _scores:
        with model_lock(model):
            if model not in _scores:
                digest = weights_digest(model)
                path = folder() / f"{digest}.scores.json"
                found = _read(HeadScores.load, path) if digest else None
                if found is None:
                    clock = time.perf_counter()
                    found = probe(model, progress=True)
                    if digest and time.perf_counter() - clock > _WORTH_KEEPING:
                        _write(found, path)
                _scores[model] = found
    return _scores[model]


def use_head_scores(model: PreTrainedModel, scores: HeadScores) -> None:
    """Let RazorAttention use these scores for the model instead of probing it."""
    with model_lock(model):
        _scores[model] = scores


def _read(load: Callable[[Path], T], path: Path) -> T | None:
    with suppress(SnapshotError):
        return load(path) if path.is_file() else None
    return None


def _write(what: Any, path: Path) -> Path | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        what.save(path)
    except (OSError, SnapshotError):
        return None
    return path
