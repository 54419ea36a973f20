"""The tables of benchmarks/donna.py."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

RUNTIMES = ("onnxruntime", "onnxruntime-int8", "torch")
MAIN = RUNTIMES[0]
SPEED_AIM = 1.2
"""The paper's claim: 20 % faster than MobileNetV2 at the same accuracy."""


def section(raw: dict[str, Any]) -> str:
    """All tables, markers left out."""
    rows, m = raw["rows"], raw["machine"]
    complete = sorted({row["seed"] for row in rows if row["kind"] == "latencies"})
    rows = [row for row in rows if row["seed"] in complete]
    parts = [
        f"Measured {raw['date']} on one thread of a machine that other jobs shared ({m['processor']}, torch "
        f"{m['torch']}); seeds {', '.join(map(str, complete))}: mean, and the range over seeds in brackets."
    ]
    parts += [one(rows) for one in (_ranking, _cost, _check, _front, _epochs, _peers, _devices)]
    return "\n\n".join(parts)


def _of(rows: Sequence[dict[str, Any]], **key: Any) -> list[dict[str, Any]]:
    return [row for row in rows if key.items() <= row.items()]


def _told(values: Sequence[float], form: str = "{:.2f}", scale: float = 1.0) -> str:
    values = [scale * value for value in values if value is not None]
    if not values:
        return ""
    middle = form.format(statistics.mean(values))
    return (
        middle if len(values) < 2 else f"{middle} ({form.format(min(values))} to {form.format(max(values))})"
    )


def _table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    told = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    return f"{title}\n\n" + "\n".join([*told, *(f"| {' | '.join(line)} |" for line in lines)])


def _ranking(rows: Sequence[dict[str, Any]]) -> str:
    own = _of(rows, kind="ranking")
    first = own[0]
    lines = [
        ["minus the sum of block errors, nothing fitted", _told([r["sum"] for r in own])],
        ["fitted predictor, each sample left out", _told([r["predictor"] for r in own])],
        ["accuracy of the assembled network", _told([r["assembled"] for r in own])],
        ["parameters", _told([r["parameters"] for r in own])],
        ["multiply-accumulates", _told([r["macs"] for r in own])],
    ]
    for count in first["fits"]:
        fits = [r["fits"][count] for r in own]
        told = _told([fit["others"] for fit in fits])
        lines.append(
            [
                f"predictor fitted to {count}: left out, RMS error in points",
                f"{_told([f['left_out'] for f in fits])}, "
                f"{_told([f['error'] for f in fits], '{:.1f}', 100)}"
                + (f"; on the others {told}" if told else ""),
            ]
        )
    for again in _of(rows, kind="repeat"):
        told = f"accuracy after a second finetuning with another seed (seed {again['seed']})"
        lines.append(
            [told, f"{again['between']:.2f}; the sum of errors with the mean of both {again['sum']:.2f}"]
        )
    head = ["signal", "Kendall's τ with accuracy after finetuning"]
    told = [tau for r in own for tau in r["categories"]]
    if told:
        lines.append(["errors of blocks predicted from their settings, with errors measured", _told(told)])
    whole = _told([r["reference_test"] for r in own], "{:.1f}", 100)
    title = (
        f"**Ranking**: {len(first['samples'])} networks of {first['networks']:,}; "
        f"{first['images'][0]:,} photos to learn from, {first['images'][1]:,} to compare with; the reference "
        f"gets {whole} % of the test photos."
    )
    return _table(title, head, lines)


def _cost(rows: Sequence[dict[str, Any]]) -> str:
    own = _of(rows, kind="ranking")
    lines = [
        [name, _told([r[key] for r in own], "{:.0f}")]
        for name, key in (
            ("reference", "reference_seconds"),
            ("library", "library_seconds"),
            ("samples", "sample_seconds"),
            ("front, exact", "front_seconds"),
        )
    ]
    total = statistics.mean(r["library_seconds"] + r["sample_seconds"] for r in own)
    fresh = _of(rows, kind="epochs", start="fresh")
    for epochs in sorted({r["epochs"] for r in fresh})[-2:]:
        each = statistics.mean(r["seconds"] for r in _of(fresh, epochs=epochs))
        lines.append([f"one network from fresh weights, {epochs} epochs", f"{each:.0f}"])
        lines.append(
            ["trainings of this length that library and samples would pay for", f"{total / each:.1f}"]
        )
    return _table("**Cost**", ["step", "seconds of processor time"], lines)


def _check(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for runtime in RUNTIMES:
        own = _of(rows, kind="check", runtime=runtime)
        if own:
            lines.append([runtime, _told([r["tau"] for r in own]), _told([r["ratio"] for r in own])])
    return _table(
        "**Sums of block times** beside ten whole networks",
        ["runtime", "Kendall's τ", "measured to sum"],
        lines,
    )


def _interpolated(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """Of the upper hull of (time, accuracy), linear in time; None outside."""
    for (a, ya), (b, yb) in pairwise(_hull(points)):
        if a <= x <= b:
            return ya + (yb - ya) * (x - a) / (b - a)
    return None


def _front(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for name, found in _found(rows).items():
        for share in dict.fromkeys(r["share"] for r in found):
            own = _of(found, share=share)
            lines.append(_line(rows, f"{name}, limit at {share:.0%}", own, lambda r: "|".join(r["variants"])))
    for family in ("mobilenetv2", "residual"):
        mine = _of(rows, kind="baseline", family=family)
        for factor, depth in dict.fromkeys((r["factor"], r["depth"]) for r in mine):
            own = _of(mine, factor=factor, depth=depth)
            name = f"{family}-like, channels × {factor}, depth {depth}"
            lines.append(_line(rows, name, own, lambda r: f"{r['family']} {r['factor']} {r['depth']}"))
    head = ["network", "ms end to end", "test accuracy, %", "parameters", "epochs"]
    told = "\n".join(
        f"- {name}, against {family}-like networks (linear between them): {_against(rows, own, family)}"
        for family in ("mobilenetv2", "residual")
        for name, own in _found(rows).items()
    )
    title = f"**Front**, {MAIN}, one thread; limits from the cheapest network (0 %) to the reference (100 %)"
    told += (
        "\n\nIn these four lines brackets are ranges over networks of all seeds. At the same accuracy only "
        "networks of the family that no other of it beats in both are interpolated."
    )
    return f"{_table(title, head, lines)}\n\n{told}"


def _found(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Found networks by how they were trained."""
    named = {
        "found": _of(rows, kind="winner", runtime=MAIN),
        "found, trained longer": _of(rows, kind="longer"),
    }
    return {name: own for name, own in named.items() if own}


def _against(rows: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]], family: str) -> str:
    """Points at the same time, and speed at the same accuracy, of the networks within the family's range."""
    gains, speed = [], []
    for seed in sorted({row["seed"] for row in rows}):
        times = _of(rows, kind="latencies", runtime=MAIN, seed=seed)[0]["milliseconds"]
        theirs = [
            (times[f"{family} {r['factor']} {r['depth']}"], r["test"])
            for r in _of(rows, kind="baseline", family=family, seed=seed)
        ]
        for row in _of(found, seed=seed):
            ms = times["|".join(row["variants"])]
            alike = _interpolated(theirs, ms)
            # The time at which they reach the same accuracy.
            slower = _interpolated([(y, x) for x, y in _hull(theirs)], row["test"])
            if alike is not None:
                gains.append(100 * (row["test"] - alike))
            if slower is not None:
                speed.append(slower / ms)
    points = f"at the same time {_told(gains, '{:+.1f}')} points ({len(gains)} networks)" if gains else ""
    many = sum(ratio >= SPEED_AIM for ratio in speed)
    counted = f"{len(speed)} networks, {many} at least {SPEED_AIM} times"
    fast = f"at the same accuracy {_told(speed)} times as fast ({counted})" if speed else ""
    return "; ".join(filter(None, [points, fast])) or "none lies in their range"


def _hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    points = sorted(points)
    return [p for i, p in enumerate(points) if all(q[1] < p[1] for q in points[:i])]


def _line(
    rows: Sequence[dict[str, Any]],
    name: str,
    own: Sequence[dict[str, Any]],
    key: Callable[[dict[str, Any]], str],
) -> list[str]:
    times = [
        _of(rows, kind="latencies", runtime=MAIN, seed=r["seed"])[0]["milliseconds"][key(r)] for r in own
    ]
    return [
        name,
        _told(times, "{:.3f}"),
        _told([r["test"] for r in own], "{:.1f}", 100),
        _told([r["parameters"] for r in own], "{:,.0f}"),
        str(own[0]["epochs"]),
    ]


def _epochs(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for start in ("library", "fresh"):
        mine = _of(rows, kind="epochs", start=start)
        for epochs in sorted({r["epochs"] for r in mine}):
            lines.append(_epochs_line(start, _of(mine, epochs=epochs)))
        longer = _of(rows, kind="longer", share=_middle(rows))  # the same network
        if start == "library" and longer:
            lines.append(_epochs_line(start, longer))
    return _table(
        "**From the library's weights and from fresh ones**, the same network and teacher",
        ["begins with", "epochs", "validation, %", "test, %"],
        lines,
    )


def _epochs_line(start: str, own: Sequence[dict[str, Any]]) -> list[str]:
    told = [_told([r[key] for r in own], "{:.1f}", 100) for key in ("validation", "test")]
    return [start, str(own[0]["epochs"]), *told]


def _middle(rows: Sequence[dict[str, Any]]) -> float:
    """The limit at which searches are compared."""
    shares = list(dict.fromkeys(r["share"] for r in _of(rows, kind="winner", runtime=MAIN)))
    share: float = shares[len(shares) // 2]
    return share


def _peers(rows: Sequence[dict[str, Any]]) -> str:
    found = _of(rows, kind="winner", runtime=MAIN, share=_middle(rows))
    lines = [_peer_line(rows, "found (library, samples, exact choice)", found)]
    fresh = [
        {**r, "variants": one["variants"]}
        for one in found
        for r in _of(rows, kind="epochs", start="fresh", epochs=one["epochs"], seed=one["seed"])
    ]
    if fresh:
        lines.append(_peer_line(rows, "the same networks from fresh weights", fresh))
    for method in ("random", "evolution"):
        mine = _of(rows, kind="peer", method=method)
        if mine:
            lines.append(_peer_line(rows, f"{method}, from fresh weights", mine))
    return _table(
        f"**At the same cost**, limit at {_middle(rows):.0%}, {found[0]['epochs']} epochs at the end; the "
        "last column is linear in time between the found networks at all limits",
        ["search", "candidates trained", "ms end to end", "test, %", "points behind found ones of its time"],
        lines,
    )


def _peer_line(rows: Sequence[dict[str, Any]], name: str, own: Sequence[dict[str, Any]]) -> list[str]:
    times, behind = [], []
    for row in own:
        known = _of(rows, kind="latencies", runtime=MAIN, seed=row["seed"])[0]["milliseconds"]
        times.append(known["|".join(row["variants"])])
        found = [
            (known["|".join(r["variants"])], r["test"])
            for r in _of(rows, kind="winner", runtime=MAIN, seed=row["seed"])
        ]
        alike = _interpolated(found, times[-1])
        if alike is not None:
            behind.append(100 * (alike - row["test"]))
    counts = [r["candidates"] for r in own if "candidates" in r]
    return [
        name,
        _told(counts, "{:.0f}") if counts else "",
        _told(times, "{:.3f}"),
        _told([r["test"] for r in own], "{:.1f}", 100),
        _told(behind, "{:.1f}") if behind else "",
    ]


def _devices(rows: Sequence[dict[str, Any]]) -> str:
    """Networks chosen for one runtime, timed on the other."""
    lines = []
    names = RUNTIMES[:2]
    for share in dict.fromkeys(r["share"] for r in _of(rows, kind="winner")):
        same, cells = [], []
        for seed in sorted({row["seed"] for row in rows}):
            one, two = (_of(rows, kind="winner", runtime=n, share=share, seed=seed)[0] for n in names)
            same.append(sum(a == b for a, b in zip(one["variants"], two["variants"], strict=True)))
        for runtime in names:
            for chosen in names:
                own = _of(rows, kind="winner", runtime=chosen, share=share)
                cells.append(
                    _told(
                        [
                            _of(rows, kind="latencies", runtime=runtime, seed=r["seed"])[0]["milliseconds"][
                                "|".join(r["variants"])
                            ]
                            for r in own
                        ],
                        "{:.3f}",
                    )
                )
        tests = [
            _told([r["test"] for r in _of(rows, kind="winner", runtime=n, share=share)], "{:.1f}", 100)
            for n in names
        ]
        lines.append([f"{share:.0%}", _told([float(x) for x in same], "{:.1f}"), *cells, *tests])
    head = ["share", "blocks alike"]
    head += [f"ms on {on}, chosen for {chosen}" for on in names for chosen in names]
    head += [f"test, %, chosen for {n}" for n in names]
    return _table("**Two devices**, each with limits of its own", head, lines)
