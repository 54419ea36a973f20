"""The tables of docs/benchmarks.md, from the raw results."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from page import write_section
from peak import FULL
from speed import BARE
from subject import EVERY, FLOOR, PRIME

from modicum.measure import Spread

_DOCS = Path(__file__).resolve().parent.parent / "docs"

# What was promised before anything was measured (ratios, except for slots and chunks).
DECODE_LONG, DECODE_SHORT, PREFILL, NEW_TOKEN, CHUNKS, PROCESS = 0.28, 1.05, 0.32, 1, 1.0, 1.05
COMPILED, EVERY_POLICY = 1.05, 1.20  # both ÷ a cache of the budget's length
SETTINGS = {"tokens": 16_384, "budget": 1_024, "chunk": 512, "threads": 2}
DEAR = 0.3  # share of a decode step above which a policy's scoring is named

Raw = dict[str, Any]


def section(raw: Raw) -> str:
    """The whole section, between its markers left out."""
    parts = [_head(raw), _targets(raw), _speed(raw), _dear(raw), _compiled(raw)]
    parts += [_storage(raw), _processes(raw), _floor(raw)]
    return "\n\n".join(parts)


def mean_and_deviation(values: Sequence[float], digits: int = 2) -> str:
    """The mean and, of several values, behind ± their standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def models_measured(raw: Raw, more: str = "") -> str:
    """The beginning of the text above tables of trained models; `more` is of how they were trained."""
    rows = raw["rows"]
    minutes = sum(row["cpu_seconds"] for row in rows) / 60
    trained = sum(row["cpu_seconds"] > 0 for row in rows)  # others are rows of a model that has one already
    return (
        f"Measured {raw['date']}, {trained} models in {minutes:.0f} minutes of one core "
        f"({raw['machine']['processor']}){more}; mean and, behind ±, standard deviation over "
        f"{len({row['seed'] for row in rows})} seeds"
    )


def difference(gaps: Sequence[float], more: str = "better", less: str = "worse") -> str:
    """Whether the mean of differences is further from 0 than their standard deviation.

    Args:
        gaps: one of each seed.
        more: the word for a mean above 0.
        less: for one below.
    """
    if len(gaps) < 2:
        return "one seed"
    mean = statistics.mean(gaps)
    return "no difference" if abs(mean) <= statistics.stdev(gaps) else more if mean > 0 else less


def publish(raw: Raw, section: Callable[[Raw], str], name: str, keep: bool) -> None:
    """Print a section of the page of results; keep: write it there, and first what it is made of."""
    if keep:
        path = _DOCS / f"benchmarks_{name.replace('-', '_')}.json"
        path.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    text = section(raw)
    if keep:
        write_section(_DOCS / "benchmarks.md", name, text)
    print(text)


def _head(raw: Raw) -> str:
    s, m = raw["settings"], raw["machine"]
    cache = f", last-level cache {m['last-level cache']}" if "last-level cache" in m else ""
    load = "" if raw["load_before"] is None else f" Load average before: {raw['load_before']:.2f}."
    return (
        f"Measured {raw['date']} in {raw['minutes']} minutes on {m['cores']} cores "
        f"({m['processor']}{cache}), {m['memory']} of memory, {m['system']}; torch {m['torch']} with "
        f"{s['threads']} threads, transformers {m['transformers']}, Python {m['python']}, modicum "
        f"{m['modicum']}.{load}\n\n"
        f"Prompt {s['tokens']:,} tokens, budget {s['budget']:,} per KV head, chunk {s['chunk']:,}; "
        f"{s['repeats']} rounds of decode blocks of {s['block']} tokens. A figure with a range is a median "
        "with its quartiles."
    )


def _targets(raw: Raw) -> str:
    s, memory = raw["settings"], raw["memory"][PRIME]
    slots = s["budget"] + NEW_TOKEN
    short, long = (_process(raw, PRIME, s[key])["peak"] for key in ("tokens", "long_tokens"))
    full, brief = f"DynamicCache at {s['tokens']:,}", f"DynamicCache at {s['budget']:,}"
    rows = [
        (f"decode at {s['tokens']:,} seen ÷ {full}", DECODE_LONG, _decode(raw, PRIME, "full"), 2),
        (f"decode at {s['tokens']:,} seen ÷ {brief}", DECODE_SHORT, _decode(raw, PRIME, "short"), 2),
        ("compiled decode ÷ StaticCache, compiled", COMPILED, _ratio(raw["compiled"], PRIME, "static"), 2),
        ("prefill ÷ DynamicCache's one-shot prefill", PREFILL, _prefill(raw, PRIME), 2),
        (
            "keys and values between calls, slots' worth per layer and head",
            slots,
            Spread.of([memory["slots"]]),
            0,
        ),
        (
            "highest above that within a call, in chunks of one layer",
            CHUNKS,
            Spread.of([memory["chunks_above"]]),
            2,
        ),
        (
            f"process peak, {s['long_tokens']:,} ÷ {s['tokens']:,} tokens",
            PROCESS,
            Spread.of([long / short]),
            2,
        ),
    ]
    lines = [
        [what, f"≤ {limit:,}", found.text(digits), "met" if found.median <= limit else "**missed**"]
        for what, limit, found, digits in rows
    ]
    text = table(["KeyDiff", "target", "measured", ""], lines)
    above = {p: _decode(raw, p, "short").median for p in _policies(raw) if p != "full"}
    dear = [f"`{p}` ({x:.2f})" for p, x in above.items() if x > EVERY_POLICY]
    text += (
        f"\n\nA token ÷ {brief} ≤ {EVERY_POLICY:.2f} is the target for every policy: "
        f"{len(above) - len(dear)} of {len(above)} rows meet it, not {', '.join(dear) or 'one'}. "
        f"`/{EVERY}` is `evict_every={EVERY}`: "
        f"so many tokens go at every {EVERY}th step, their room taken from the budget.\n\n"
        f"Below every prefill: the same chunks by transformers, each forgotten at once, take "
        f"{_prefill(raw, BARE).text()} of the one-shot prefill."
    )
    other = {key: s[key] for key in SETTINGS if s[key] != SETTINGS[key]}
    if other:
        text += "\n\nThe targets are for other settings than these: " + ", ".join(
            f"{key} {SETTINGS[key]:,}" for key in other
        )
        text += "."
    return f"### Targets\n\n{text}"


def _speed(raw: Raw) -> str:
    lines = []
    for policy in _policies(raw):
        lines.append(
            [
                f"`{policy}`",
                f"{_median(raw['prefill'], policy, 'seconds'):.2f} s",
                _prefill(raw, policy).text(),
                f"{_median(raw['decode'], policy, 'seconds') * 1e3:.1f} ms",
                _decode(raw, policy, "full").text(),
                _decode(raw, policy, "short").text(),
                _percent(_share(raw, policy)),
            ]
        )
    s = raw["settings"]
    one_shot = Spread.of({x["one_shot"] for x in raw["prefill"]})
    long, short = (Spread.of(x[key] for x in raw["decode"]) for key in ("full", "short"))
    head = ["policy", "prefill", "÷ one-shot", "a token", f"÷ full at {s['tokens']:,}"]
    head += [f"÷ full at {s['budget']:,}", "scoring"]
    return (
        "### Speed\n\n"
        f"DynamicCache: prefill in one shot {one_shot.text(1, unit=' s')}; a decoded token "
        f"{long.text(1, 1e3, ' ms')} at {s['tokens']:,} and {short.text(1, 1e3, ' ms')} at {s['budget']:,} "
        f"tokens. *scoring*: share of a decode step beyond what `{FLOOR}` takes.\n\n" + table(head, lines)
    )


def _dear(raw: Raw) -> str:
    shares = {policy: _share(raw, policy) for policy in _policies(raw)}
    dear = [f"`{p}` ({x.median:.1%})" for p, x in shares.items() if x is not None and x.median > DEAR]
    if not dear:
        return f"No policy spends more than {DEAR:.0%} of a decode step on scoring."
    return f"More than {DEAR:.0%} of a decode step goes into scoring with {', '.join(dear)}."


def _compiled(raw: Raw) -> str:
    s, samples = raw["settings"], raw["compiled"]
    lines = [
        [
            f"`{policy}`",
            f"{_median(samples, policy, 'seconds') * 1e3:.1f} ms",
            _ratio(samples, policy, "static").text(),
            f"{_median(samples, policy, 'first'):.0f} s",
        ]
        for policy in s["compiled"]
    ]
    static = Spread.of(x["static"] for x in samples)
    return (
        "### Compiled\n\n"
        f"`torch.compile` of the decode step, one graph, beside a compiled `StaticCache` of "
        f"{s['budget']:,} + {s['chunk']:,} tokens, whose step takes "
        f"{static.text(1, 1e3, ' ms')}. *First*: the step that "
        "compiles.\n\n" + table(["policy", "a token", "÷ StaticCache, compiled", "first"], lines)
    )


def _storage(raw: Raw) -> str:
    lines = []
    for policy in _policies(raw):
        m = raw["memory"][policy]
        held = m["held"]
        lines.append(
            [
                f"`{policy}`",
                *(_size(m["bytes"][kind]) for kind in ("keys and values", "positions", "policy state")),
                _size(m["nbytes"]),
                f"{m['nbytes'] / m['full_nbytes']:.1%}",
                f"{m['slots']:,.1f}",
                f"{m['slots_worth']:,.1f}",
                f"{held['min']:,}" if held["min"] == held["max"] else f"{held['min']:,}–{held['max']:,}",
                f"{m['chunks_above']:.2f}",
            ]
        )
    head = ["policy", "keys + values", "positions", "policy state", "all", "of a full cache", "slots"]
    head += ["all as slots", "held per head", "peak above, chunks"]
    return (
        "### KV bytes between calls\n\n"
        "After the prompt, from live storage. *slots*: keys and values in slots' worth per layer and head, "
        "the new token's included; *all as slots*: with positions and policy state. *peak above*: the "
        "high-water mark within calls less what is held between them, in units of one layer's chunk of keys "
        "and values.\n\n" + table(head, lines) + _full_note(raw)
    )


def _full_note(raw: Raw) -> str:
    if "full" not in raw["memory"]:
        return ""
    return "\n\n`full` never evicts, so it alone had a budget as large as the whole run."


def _processes(raw: Raw) -> str:
    lines = [
        [
            "DynamicCache, `model.generate`"
            if p["policy"] == FULL
            else f"`{p['policy']}`, `modicum.generate`",
            f"{p['tokens']:,}",
            _size(p["peak"]),
            _size(p["peak"] - p["loaded"]),
            f"{p['seconds']:.1f} s",
        ]
        for p in raw["processes"]
    ]
    return (
        "### Peak memory of a whole process\n\n"
        "A fresh process that loads the model and answers one prompt; the interpreter, torch and the weights "
        "are in it.\n\n" + table(["", "prompt", "peak", "above the loaded model", "time"], lines)
    )


def _floor(raw: Raw) -> str:
    s = raw["settings"]
    bandwidth = Spread.of(raw["copy_bandwidth"])
    steps: list[tuple[str, float, float]] = []
    for length, key in ((s["tokens"], "full"), (s["budget"], "short")):
        step = Spread.of(x[key] for x in raw["decode"]).median
        steps.append(
            (f"DynamicCache at {length:,}", raw["weights_nbytes"] + length * raw["token_nbytes"], step)
        )
    for policy in _policies(raw):
        reads = raw["weights_nbytes"] + raw["memory"][policy]["bytes"]["keys and values"]
        steps.append((f"`{policy}`", reads, _median(raw["decode"], policy, "seconds")))
    lines = [
        [
            name,
            _size(nbytes),
            f"{nbytes / bandwidth.median * 1e3:.1f} ms",
            f"{step * 1e3:.1f} ms",
            f"{nbytes / step / 1e9:.1f} GB/s",
            f"{nbytes / bandwidth.median / step:.0%}",
        ]
        for name, nbytes, step in steps
    ]
    head = ["", "must read", "at that speed", "a token takes", "achieved", "floor ÷ step"]
    return (
        "### How near the floor\n\n"
        f"A decode step must read the weights ({_size(raw['weights_nbytes'])}; a row of the input embeddings "
        "is next to nothing) and the keys and values held. A large copy in the same run moved "
        f"{bandwidth.text(1, 1e-9, ' GB/s')}, reads and writes counted.\n\n" + table(head, lines)
    )


def _policies(raw: Raw) -> list[str]:
    return list(raw["settings"]["policies"])


def _ratio(samples: Sequence[Raw], policy: str, below: str) -> Spread:
    return Spread.of(x["seconds"] / x[below] for x in samples if x["policy"] == policy)


def _prefill(raw: Raw, policy: str) -> Spread:
    return _ratio(raw["prefill"], policy, "one_shot")


def _decode(raw: Raw, policy: str, below: str) -> Spread:
    return _ratio(raw["decode"], policy, below)


def _median(samples: Sequence[Raw], policy: str, key: str) -> float:
    return statistics.median(float(x[key]) for x in samples if x["policy"] == policy)


def _share(raw: Raw, policy: str) -> Spread | None:
    """Of a policy's decode steps, the share beyond the floor's in the same round."""
    if policy in (FLOOR, "full"):
        return None
    floor = {x["round"]: x["seconds"] for x in raw["decode"] if x["policy"] == FLOOR}
    own = (x for x in raw["decode"] if x["policy"] == policy)
    return Spread.of(1 - floor[x["round"]] / x["seconds"] for x in own)


def _process(raw: Raw, policy: str, tokens: int) -> Raw:
    return next(p for p in raw["processes"] if p["policy"] == policy and p["tokens"] == tokens)


def _percent(share: Spread | None) -> str:
    return "–" if share is None else share.text(0, 100, "%")


def _size(nbytes: float) -> str:
    if nbytes and nbytes < 2**20:
        return f"{nbytes / 2**10:.1f} KiB"
    return f"{nbytes / 2**20:.1f} MiB" if nbytes else "0"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
