"""Pictures of the KeyDiff experiment."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from common import COLOURS, MARKERS
from matplotlib.ticker import NullLocator

from modicum.report.style import byte_axis


def draw_correlation(found: dict[str, Any]) -> Any:
    """Heat map of the correlations, and attention by decile of distance."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.4), width_ratios=(1, 1, 1.25), layout="constrained")
    for axis, (name, group) in zip(axes, found.items(), strict=False):
        values = torch.tensor(group["last quarter"])
        image = axis.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        for (layer, head), value in np.ndenumerate(values.numpy()):
            axis.text(
                head,
                layer,
                f"{value:+.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if abs(value) > 0.6 else "black",
            )
        axis.set(title=name, xlabel="KV head", ylabel="layer" if axis is axes[0] else "")
        axis.set_xticks(range(values.shape[1]))
        axis.set_yticks(range(values.shape[0]))
    figure.colorbar(image, ax=axes[1], label="rank correlation")
    for i, line in enumerate(found["running text"]["deciles"]):
        axes[2].plot(range(1, 11), line, marker=".", color=plt.cm.viridis(i / 6), label=f"layer {i}")
    axes[2].axhline(1, color="grey", lw=0.8, ls=":")
    axes[2].set(
        title="running text",
        xlabel="tenth of the keys (10: farthest out)",
        yscale="log",
        ylabel="attention ÷ an even share",
    )
    axes[2].set_xticks(range(1, 11))
    axes[2].yaxis.set_minor_locator(NullLocator())
    axes[2].set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
    axes[2].legend(fontsize=7.5, ncol=2)
    return figure


def draw_accuracy(found: list[dict[str, Any]]) -> Any:
    """Right answers against measured bytes."""
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(row["task"] for row in found))
    names = list(dict.fromkeys(row["policy"] for row in found if row["budget"]))
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(5 * len(tasks), 3.7), sharey=True, layout="constrained"
    )
    for axis, task in zip(axes, tasks, strict=True):
        mine = [row for row in found if row["task"] == task]
        full = next(row for row in mine if row["policy"] == "full")
        for policy in names:
            rows = sorted((r for r in mine if r["policy"] == policy), key=lambda r: r["nbytes"])
            base = policy.split(",")[0]
            y = [100 * r["tokens"]["mean"] for r in rows]
            spread = [
                [100 * (r["tokens"]["mean"] - r["tokens"]["low"]) for r in rows],
                [100 * (r["tokens"]["high"] - r["tokens"]["mean"]) for r in rows],
            ]
            bare = "," in policy
            axis.errorbar(
                [r["nbytes"] for r in rows],
                y,
                None if bare else spread,
                label=policy,
                capsize=2,
                color=COLOURS[base],
                marker="." if bare else MARKERS[base],
                ls=":" if bare else "-",
                lw=1.4,
                ms=5,
                elinewidth=0.7,
            )
        axis.axhline(100 * full["tokens"]["mean"], color="black", ls="--", lw=1, label="full cache")
        byte_axis(axis, [r["nbytes"] for r in mine], "bytes held after the context")
        axis.set(title=task, ylim=(-3, 103))
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("tokens of answers right, %")
    axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def draw_memory(found: list[dict[str, Any]]) -> Any:
    """Bytes against the length of the prompt."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5.5, 3.3), layout="constrained")
    x = [row["tokens"] for row in found]
    grown = [(row["resident"] - row["loaded"]) / 2**20 for row in found]
    axis.plot(x, [row["full"] / 2**20 for row in found], "--k", marker="*", label="a full cache would hold")
    axis.plot(x, grown, color="#d55e00", marker="s", label="process: what reading added at its peak")
    axis.plot(
        x, [row["peak"] / 2**20 for row in found], color="#56b4e9", marker="v", label="KeyDiff's cache, peak"
    )
    axis.plot(
        x,
        [row["nbytes"] / 2**20 for row in found],
        color=COLOURS["keydiff"],
        marker="o",
        label="KeyDiff's cache, held",
    )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(x, [f"{n:,}" for n in x])
    axis.set(xlabel="tokens read", ylabel="MiB")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.25)
    return figure
