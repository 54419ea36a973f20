"""The tables and the picture of docs/experiments/which.md, from the raw results of which.py."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import common
from interval import Interval

USES = {
    "long prompt": "the question is the end of the prompt",
    "many questions": "the context is compressed before any question is known",
    "long answer": "the answer itself outgrows the budget, and looks back",
}

Raw = dict[str, Any]


def publish(asked: common.Options, raw: Raw) -> None:
    """Print and write everything."""
    parts = [_setup(raw)]
    for use, what in USES.items():
        parts += [f"### {use.capitalize()}: {what}", _table(raw, use)]
    parts += ["### What `auto` is made of", _parts(raw)]
    parts += ["### Best of each use", _best(raw), "![Right answers against bytes held](which.png)"]
    common.paint(None if asked.out is None else asked.out / "which.png", lambda: _draw(raw))
    common.publish("which", asked, raw, "\n\n".join(parts))


def ranked(raw: Raw, use: str, share: str | None = None) -> list[str]:
    """The policies, best first: by right answers, then by right tokens; over all budgets if none is given."""
    found = raw["uses"][use]["policies"]
    shares = [str(s) for s in raw["settings"]["shares"]] if share is None else [share]

    def score(policy: str) -> tuple[float, float]:
        cells = [found[policy][s] for s in shares]
        return (fmean(c["right"]["mean"] for c in cells), fmean(c["tokens"]["mean"] for c in cells))

    return sorted(found, key=score, reverse=True)


def _setup(raw: Raw) -> str:
    s = raw["settings"]
    tried = ", ".join(f"{100 * right:.0f} % at {int(length):,}" for length, right in raw["tried"].items())
    return (
        f"Contexts of {raw['length']:,} tokens with {s['facts']} needles, {s['contexts']} of them (full "
        f"cache: {tried} tokens), read in chunks of {s['chunk']}; long answers of {raw['stream']:,} tokens, "
        f"read {s['step']} at a time. Budgets are shares of the full cache's bytes. {common.SCORES}"
    )


def _table(raw: Raw, use: str) -> str:
    part, shares = raw["uses"][use], raw["settings"]["shares"]
    rows: list[list[str]] = [["full", *[common.percent(part["full"])] * len(shares)]]
    for policy in ranked(raw, use):
        rows.append([f"`{policy}`", *(common.percent(part["policies"][policy][str(s)]) for s in shares)])
    return common.table(["policy", *(f"{100 * s:.0f} % of the bytes" for s in shares)], rows)


def _parts(raw: Raw) -> str:
    shares = raw["settings"]["shares"][:2]
    rows = []
    for use, part in raw["parts"].items():
        whole = {name: raw["uses"][use]["policies"].get(name, {}) for name in ("auto", "razor")}
        measured = {**whole, **part}
        for policy, cells in measured.items():
            if all(str(s) in cells for s in shares):
                rows.append([f"{use}: `{policy}`", *(common.percent(cells[str(s)]) for s in shares)])
    return common.table(["use and policy", *(f"{100 * s:.0f} % of the bytes" for s in shares)], rows)


def _best(raw: Raw) -> str:
    rows = []
    for use in USES:
        part = raw["uses"][use]["policies"]
        for share in raw["settings"]["shares"]:
            first, *others = ranked(raw, use, str(share))
            best = part[first][str(share)]["right"]
            ties = []
            for other in others:
                less = Interval.between(best["each"], part[other][str(share)]["right"]["each"])
                if not less.clear:
                    ties.append(f"`{other}`")
            rows.append(
                [
                    f"{use}, {100 * share:.0f} %",
                    f"`{first}`",
                    f"{100 * best['mean']:.0f}",
                    ", ".join(ties[:4]) + (f" and {len(ties) - 4} more" if len(ties) > 4 else "") or "none",
                ]
            )
    return common.table(["use and bytes", "best", "right, %", "not clearly worse (95 %, paired)"], rows)


def _draw(raw: Raw) -> Any:
    import matplotlib.pyplot as plt

    figure, panes = plt.subplots(1, len(USES), figsize=(11, 3.6), sharey=True)
    shares = raw["settings"]["shares"]
    # Beside the policies that every picture has.
    extra = {"auto": "#000000", "manifoldkv": "#7f3c8d", "razor": "#999933"}
    shown = [p for p in ranked(raw, "many questions") if p in common.COLOURS or p in extra]
    for pane, use in zip(panes, USES, strict=True):
        part = raw["uses"][use]
        for policy in shown:
            if policy not in part["policies"]:
                continue
            cells = [part["policies"][policy][str(s)] for s in shares]
            pane.plot(
                [c["nbytes"] / 2**20 for c in cells],
                [100 * c["right"]["mean"] for c in cells],
                color=common.COLOURS.get(policy) or extra[policy],
                marker=common.MARKERS.get(policy, "*"),
                label=policy,
            )
        pane.axhline(100 * part["full"]["right"]["mean"], color="#5b6570", linestyle=":", label="full cache")
        pane.set_title(use)
        pane.set_xlabel("MiB held per context")
    panes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    panes[0].set_ylabel("right answers, %")
    figure.tight_layout()
    return figure
