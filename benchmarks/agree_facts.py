"""Beside the agreement: the bytes that both sides hold, and what left padding does to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agree_models import Task, Tiny, random_ids
from agree_ours import CASES, TOKENS, WINDOW, fill, kept_by

_BYTES = Tiny("llama", layers=2, hidden=256, heads=8, kv_heads=2, head_dim=128, dtype="bfloat16")
_BYTES_TOKENS, _BYTES_BUDGET, _BYTES_WINDOW = 2048, 512, 32


_PADDED = Tiny("llama")
_PADS = (0, 100)
_PADDED_BUDGET = 80
SETTINGS = {
    "bytes": {"tokens": _BYTES_TOKENS, "budget": _BYTES_BUDGET, "window": _BYTES_WINDOW},
    "padding": {"tokens": TOKENS, "pads": _PADS, "budget": _PADDED_BUDGET},
}


def byte_tasks() -> list[Task]:
    """A quarter of a longer prompt, at a usual head dimension."""
    ids = random_ids(1, _BYTES_TOKENS, [0], 0)
    return [
        Task(f"bytes/{case.press}", case.press, _BYTES, ids, [0], _BYTES_BUDGET, _BYTES_WINDOW, kept=False)
        for case in CASES
    ]


def measure_bytes(folder: Path, results: dict[str, Any]) -> list[Any]:
    """Live storage after the prefill as shares of the full cache's keys and values."""
    model, ids = _BYTES.load(folder), random_ids(1, _BYTES_TOKENS, [0], 0)
    lines = []
    for case in CASES:
        policy = case.policy.replace(f"window={WINDOW}", f"window={_BYTES_WINDOW}")
        cache = fill(model, policy, ids, [0], _BYTES_BUDGET, n_sink=case.n_sink)
        theirs = results[f"bytes/{case.press}"]
        lines.append(
            {
                "policy": case.title,
                "nominal": _BYTES_BUDGET / _BYTES_TOKENS,
                "modicum": cache.nbytes / cache.full_nbytes,
                "kvpress": (theirs["nbytes"] + theirs["indices_nbytes"]) / cache.full_nbytes,
                "kvpress_indices": theirs["indices_nbytes"] / cache.full_nbytes,
            }
        )
    return lines


def padded_tasks() -> list[Task]:
    """A batch whose second row begins with pads, and that row alone."""
    ids = random_ids(2, TOKENS, list(_PADS), 0)
    alone = [ids[1][_PADS[1] :]]
    tasks = []
    for case in CASES:
        common = (case.press, _PADDED)
        tasks.append(
            Task(f"batch/{case.press}", *common, ids, list(_PADS), _PADDED_BUDGET, WINDOW, kept=True)
        )
        tasks.append(Task(f"alone/{case.press}", *common, alone, [0], _PADDED_BUDGET, WINDOW, kept=True))
    return tasks


def measure_padding(folder: Path, results: dict[str, Any]) -> list[Any]:
    """Of the padded row's slots: the share spent on pads, and the share that it keeps alone too."""
    model, ids = _PADDED.load(folder), random_ids(2, TOKENS, list(_PADS), 0)
    lines = []
    for case in CASES:
        batch, alone = (
            kept_by(fill(model, case.policy, rows, pads, _PADDED_BUDGET, n_sink=case.n_sink))
            for rows, pads in ((ids, list(_PADS)), ([ids[1][_PADS[1] :]], [0]))
        )
        theirs = [results[f"{which}/{case.press}"]["kept"] for which in ("batch", "alone")]
        line: dict[str, Any] = {"policy": case.title}
        for side, (many, one) in (("modicum", (batch, alone)), ("kvpress", theirs)):
            slots = same = pads = 0
            for layer, other in zip(many, one, strict=True):
                for a, b in zip(layer[1], other[0], strict=True):
                    slots, pads, same = slots + len(a), pads + a.count(-1), same + len({*a} & {*b})
            line |= {f"{side}_pads": pads / slots, f"{side}_same": same / slots}
        lines.append(line)
    return lines
