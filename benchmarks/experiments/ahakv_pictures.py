"""Pictures of the AhaKV experiment."""

from __future__ import annotations

import math
from typing import Any

from common import COLOURS


def draw_places(found: list[dict[str, Any]]) -> Any:
    """Histograms of the kept positions."""
    import matplotlib.pyplot as plt

    chunks = list(dict.fromkeys(row["chunk"] for row in found))
    figure, axes = plt.subplots(1, len(chunks), figsize=(9.5, 3.4), layout="constrained")
    for axis, chunk in zip(axes, chunks, strict=True):
        for row in (row for row in found if row["chunk"] == chunk):
            bins = len(row["histogram"])
            edges = [i / bins for i in range(bins + 1)]
            axis.stairs(
                row["histogram"],
                edges,
                color=COLOURS[row["policy"]],
                lw=1.6,
                label=f"{row['policy']} (mean {row['mean']:.2f})",
            )
        axis.axhline(1, color="grey", lw=0.8, ls=":")
        axis.set(
            title=f"read in chunks of {chunk}" if chunk == min(chunks) else "read at once",
            xlabel="place in the text, 0 start, 1 end",
            ylabel="kept ÷ an even choice",
            xlim=(0, 1),
            ylim=(0, None),
        )
        axis.legend(fontsize=8.5)
    return figure


def draw_entropy(found: list[dict[str, Any]]) -> Any:
    """Entropy against the length of the context."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    first = min(row["budget"] for row in found if row["budget"])
    colours = iter(("#009e73", "#0072b2", "#d55e00"))
    for k in dict.fromkeys(row["budget"] for row in found):
        rows = [row for row in found if row["budget"] == k and (k is None or row["tokens"] > k)]
        x = [row["tokens"] for row in rows]
        colour = "black" if k is None else next(colours)
        label = "no gain" if k is None else f"step gain, b = {k}"
        axis.plot(x, [row["entropy"] for row in rows], marker="o", color=colour, label=label)
        axis.fill_between(
            x, *([row["quartiles"][i] for row in rows] for i in (0, 1)), color=colour, alpha=0.1, lw=0
        )
        if k is not None:
            told = {"marker": "x", "ls": "-.", "lw": 0.9, "color": colour}
            axis.plot(
                x,
                [row["standardised"] for row in rows],
                label="gain on standardised logits" if k == first else None,
                **told,
            )
            axis.axhline(math.log(k), color=colour, ls="--", lw=1)
            axis.annotate(
                f"ln {k}",
                (1.01, math.log(k)),
                xycoords=("axes fraction", "data"),
                color=colour,
                va="center",
                fontsize=9,
            )
    x = sorted({row["tokens"] for row in found})
    axis.plot(x, [math.log(n) for n in x], color="grey", ls=":", label="even attention: ln n")
    axis.set_xscale("log", base=2)
    axis.set_xticks(x, [f"{n:,}" for n in x])
    axis.set(xlabel="tokens in the context", ylabel="entropy of a row, nats")
    axis.legend(fontsize=8.5, loc="center left", bbox_to_anchor=(1.13, 0.5))
    return figure


def draw_ablations(found: list[dict[str, Any]]) -> Any:
    """Right answers by parts, and loss."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.7), sharey=True, layout="constrained")
    full = next(row for row in found if not row["part"])
    sizes = sorted({row["part"] for row in found if row["part"]}, reverse=True)
    for i, part in enumerate(sizes):
        rows = [row for row in found if row["part"] == part]
        y = [j + (i - 0.5) * 0.22 for j in range(len(rows))]
        style = {
            "color": ("#56b4e9", "#0072b2", "#d55e00")[i],
            "label": f"budget 1/{part}",
            "fmt": "o",
            "ms": 5,
        }
        for axis, task in zip(axes, ("needle", "keys"), strict=False):
            mean = [100 * row[task]["tokens"]["mean"] for row in rows]
            spread = [
                [100 * (r[task]["tokens"]["mean"] - r[task]["tokens"]["low"]) for r in rows],
                [100 * (r[task]["tokens"]["high"] - r[task]["tokens"]["mean"]) for r in rows],
            ]
            axis.errorbar(mean, y, xerr=spread, capsize=2, elinewidth=0.8, **style)
        axes[2].errorbar([math.exp(sum(r["loss"]) / len(r["loss"])) for r in rows], y, **style)
    for axis, task in zip(axes, ("needle", "keys"), strict=False):
        axis.axvline(100 * full[task]["tokens"]["mean"], color="black", ls="--", lw=1)
        axis.set(title=task, xlabel="tokens right, % (dashed: full)", xlim=(-3, 103))
    axes[2].axvline(math.exp(sum(full["loss"]) / len(full["loss"])), color="black", ls="--", lw=1)
    axes[2].set(title="running text", xlabel="perplexity (dashed: full)")
    names = [row["policy"] for row in found if row["part"] == sizes[0]]
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    for axis in axes:
        axis.grid(alpha=0.25)
    axes[2].legend(fontsize=8.5)
    return figure
