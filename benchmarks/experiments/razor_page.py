"""The tables and pictures of docs/experiments/razor.md, from the raw results of razor.py."""

from __future__ import annotations

from typing import Any

import common
import torch
from interval import Interval

_TASKS = {"needle": "a number in a text", "keys": "one of eight numbers in a text"}
_KINDS = {"right": "answers right", "tokens": "answer tokens right"}
_LOOKS = {
    "probe": ("#d55e00", "o", "-", "probe's heads whole"),
    "probe, N/5": ("#0072b2", "s", "-", "probe's heads, others N/5"),
    "probe, chunks": ("#009e73", "^", "-", "probe's heads, in chunks"),
    "random": ("#5b6570", "v", ":", "random heads whole"),
}
_TOKENS = {
    "no token": "no token",
    "N_d^0": "token, weight 1",
    "N_d^0.5": "token, weight √N_d",
    "N_d^1": "token, weight N_d",
}

Raw = dict[str, Any]


def publish(asked: common.Options, raw: Raw) -> None:
    """Print and write everything."""
    parts = [
        "### What the probe finds, and what its heads are needed for",
        _knockout(raw),
        "![Scores and single knock-outs per head](razor-heads.png)",
        "### Share of heads against accuracy and bytes",
        _shares(raw),
        "![Accuracy against bytes](razor-share.png)",
        "### The virtual token and its weight",
        _tokens(raw),
        "![The virtual token](razor-token.png)",
    ]
    for name, draw in (("heads", _draw_heads), ("share", _draw_shares), ("token", _draw_tokens)):
        path = None if asked.out is None else asked.out / f"razor-{name}.png"
        common.paint(path, lambda draw=draw: draw(raw))  # type: ignore[misc]
    common.publish("razor", asked, raw, "\n\n".join(parts))


def _knockout(raw: Raw) -> str:
    out, s = raw["knockout"], raw["settings"]
    n, total = len(out["found"]), sum(map(len, raw["scores"]["echo"]))
    rows = []
    for task, done in out["tasks"].items():
        for kind, label in _KINDS.items():
            drawn = [
                sum(column) / len(column) for column in zip(*(x[kind] for x in done["random"]), strict=True)
            ]
            means = [100 * _mean(x[kind]) for x in done["random"]]
            rows.append(
                [
                    f"{_TASKS[task]}: {label}",
                    Interval.of(done["full"][kind]).percent(),
                    Interval.of(done["found"][kind]).percent(),
                    f"{Interval.of(drawn).percent()}, sets {min(means):.1f} to {max(means):.1f}",
                    _marked(Interval.between(done["found"][kind], drawn)),
                    Interval.of(done["others"][kind]).percent(),
                ]
            )
    head = [
        "percent",
        "full cache",
        f"the {n} found stream",
        f"{n} random others stream",
        "found − random",
        f"all but the {n} found stream",
    ]
    names = ", ".join(f"{i}.{j}" for i, j in out["found"])
    single = torch.tensor([_mean(x[raw["compared"]]) for x in out["single"]])
    drop = _mean(out["single_full"][raw["compared"]]) - single
    lines = []
    for kind in ("induction", "echo"):
        flat = torch.tensor([x for layer in raw["scores"][kind] for x in layer])
        lines.append(f"{float(common.spearman(drop, flat)):.2f} with {kind}")
    worst = drop.argsort(descending=True)[:5].tolist()
    heads = [(i, j) for i, layer in enumerate(raw["scores"]["echo"]) for j in range(len(layer))]
    hurts = ", ".join(f"{heads[k][0]}.{heads[k][1]} (−{100 * float(drop[k]):.0f})" for k in worst)
    by_layer = ", ".join(
        f"layer {i} {100 * (_mean(out['single_full'][raw['compared']]) - _mean(x[raw['compared']])):.0f}"
        for i, x in enumerate(out["layers"])
    )
    return (
        f"Probe: {s['probe_tokens']} random tokens four times, {len(s['probe_seeds'])} seeds. The paper's "
        f"rule finds {n} of {total} KV heads ({100 * n / total:.0f} %): {names} (layer.head). Contexts "
        f"({', '.join(f'{_TASKS[t]} {size:.0f} tokens' for t, size in raw['context_tokens'].items())}) are "
        f"read at once; then heads that stream keep {s['n_sink']} sinks and the newest, {_least(raw)} tokens "
        f"in all, without a virtual token, and the questions come. {s['contexts']} contexts, {s['draws']} "
        f"random sets.\n\n{common.table(head, rows)}\n\n"
        f"One head at a time ({_KINDS[raw['compared']]}, number): rank correlation of what is lost over all "
        f"heads is "
        f"{' and '.join(lines)}. The five heads that cost most points: {hurts}. "
        f"All four heads of a layer at a time, points lost: {by_layer}."
    )


def _shares(raw: Raw) -> str:
    parts = []
    for task in dict.fromkeys(row["task"] for row in raw["shares"]):
        mine = [row for row in raw["shares"] if row["task"] == task]
        (full,) = [row for row in mine if row["form"] == "full"]
        rows = []
        for share in raw["settings"]["shares"]:
            at = {row["form"]: row for row in mine if row["share"] == share}
            cells = [f"{at['probe']['heads']} ({100 * share:.0f} %)"]
            for form in ("probe", "probe, N/5", "probe, chunks"):
                row = at[form]
                cells += [
                    f"{100 * row['nbytes'] / row['full_nbytes']:.0f} %",
                    _marked(Interval.between(row[raw["compared"]], full[raw["compared"]])),
                ]
            drawn = [_mean(at[form][raw["compared"]]) for form in at if form.startswith("random")]
            cells.append(f"{100 * (sum(drawn) / len(drawn) - _mean(full['right'])):+.1f}")
            rows.append(cells)
        head = [
            "heads whole",
            "bytes",
            "sinks + recent",
            "bytes",
            "N/5",
            "bytes",
            "in chunks",
            "random heads",
        ]
        parts.append(
            f"**{_TASKS[task]}**: full cache {Interval.of(full['right']).percent()} %. Columns: measured "
            f"bytes of the full cache's, and points lost or won, paired, 95 % interval.\n\n"
            f"{common.table(head, rows)}"
        )
    return "\n\n".join(parts)


def _tokens(raw: Raw) -> str:
    full = raw["token"][0]
    rows = []
    for row in raw["token"][1:]:
        rows.append(
            [
                f"{100 * row['share']:.0f} %: {_TOKENS[row['token']]}",
                *(Interval.of(row["scores"]["needle"][kind]).percent() for kind in _KINDS),
                f"{_mean(row['error']):.3f}",
                _plain(Interval.of(row["kl"])),
                f"{_mean(row['loss']):.4f}",
            ]
        )
    head = [
        "heads whole",
        *(f"number: {label}, %" for label in _KINDS.values()),
        "output error of the heads that stream",
        "KL",
        "loss",
    ]
    s = raw["settings"]
    return (
        f"Heads that stream hold {_least(raw)} tokens, with the virtual one where there is one. Tasks are "
        f"read at once; error, KL and loss (nats) are of running text, read in chunks of {s['chunk']}, "
        f"against the full cache, whose loss is {_mean(full['loss']):.4f}.\n\n{common.table(head, rows)}"
    )


def _least(raw: Raw) -> int:
    s = raw["settings"]
    return int(s["n_sink"]) + int(s["recent"]) + 1


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _plain(x: Interval) -> str:
    return f"{x.mean:.4f} [{x.low:.4f}, {x.high:.4f}]"


def _marked(gap: Interval) -> str:
    return f"**{gap.percent(signed=True)}**" if gap.clear else gap.percent(signed=True)


def _draw_heads(raw: Raw) -> Any:
    import matplotlib.pyplot as plt

    scores, out = raw["scores"], raw["knockout"]
    left = iter(out["single"])
    lost = [
        [100 * (_mean(out["single_full"][raw["compared"]]) - _mean(next(left)[raw["compared"]])) for _ in row]
        for row in scores["echo"]
    ]
    weight = max(max(row) for kind in ("echo", "induction") for row in scores[kind])
    views = [
        ("echo", scores["echo"], "{:.2f}", weight, "viridis"),
        ("induction", scores["induction"], "{:.2f}", weight, "viridis"),
        ("points lost where it streams", lost, "{:.0f}", max(1, *map(max, lost)), "magma"),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.6), layout="constrained")
    for axis, (title, table, form, most, colours) in zip(axes, views, strict=True):
        image = axis.imshow(table, vmin=0, vmax=most, cmap=colours, aspect="auto")
        for i, row in enumerate(table):
            for j, x in enumerate(row):
                colour = "white" if x < 0.6 * most else "black"
                axis.text(j, i, form.format(x), ha="center", va="center", fontsize=8.5, color=colour)
        for i, j in out["found"]:
            box = plt.Rectangle(
                (j - 0.48, i - 0.48), 0.96, 0.96, fill=False, edgecolor="#ff5a36", linewidth=2
            )
            axis.add_patch(box)
        axis.set_title(title)
        axis.set_xlabel("KV head")
        axis.set_xticks(range(len(table[0])))
        axis.set_yticks(range(len(table)))
        figure.colorbar(image, ax=axis, shrink=0.85)
    axes[0].set_ylabel("layer")
    figure.suptitle("Framed: the heads that the paper's rule takes", fontsize=11)
    return figure


def _draw_shares(raw: Raw) -> Any:
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(row["task"] for row in raw["shares"]))
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(7.2 if len(tasks) == 1 else 9.5, 4.6), sharey=True, squeeze=False
    )
    axes = axes[0]
    for axis, task in zip(axes, tasks, strict=True):
        mine = [row for row in raw["shares"] if row["task"] == task]
        (full,) = [row for row in mine if row["form"] == "full"]
        axis.axhline(
            100 * _mean(full[raw["compared"]]),
            color="#1f2328",
            linestyle="--",
            linewidth=1,
            label="full cache",
        )
        axis.axvline(30, color="#9aa2ab", linewidth=1)
        labelled = set()
        for form in dict.fromkeys(row["form"] for row in mine if row["form"] != "full"):
            kind = "random" if form.startswith("random") else form
            colour, marker, dash, label = _LOOKS[kind]
            rows = [row for row in mine if row["form"] == form]
            at = [100 * row["nbytes"] / row["full_nbytes"] for row in rows]
            spread = [Interval.of(row[raw["compared"]]) for row in rows]
            bars = [[100 * (x.mean - x.low) for x in spread], [100 * (x.high - x.mean) for x in spread]]
            axis.errorbar(
                at,
                [100 * x.mean for x in spread],
                None if kind == "random" else bars,
                color=colour,
                marker=marker,
                linestyle=dash,
                markersize=5,
                capsize=2,
                label=None if kind in labelled else label,
            )
            labelled.add(kind)
        axis.set_title(_TASKS[task])
        axis.set_xlabel("bytes held, % of the full cache (line: 30 %)")
        axis.set_ylim(-3, 103)
        axis.grid(axis="y", alpha=0.35)
    axes[0].set_ylabel(f"{_KINDS[raw['compared']]}, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=3, loc="lower center")
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    return figure


def _draw_tokens(raw: Raw) -> Any:
    import matplotlib.pyplot as plt

    rows = raw["token"][1:]
    shares = list(dict.fromkeys(row["share"] for row in rows))
    views = [
        (
            f"number, {_KINDS[raw['compared']]}, %",
            lambda row: [100 * x for x in row["scores"]["needle"][raw["compared"]]],
        ),
        ("output error of the heads that stream", lambda row: row["error"]),
        ("KL to the full cache, nats", lambda row: row["kl"]),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.6))
    colours = ("#9aa2ab", "#56b4e9", "#0072b2", "#d55e00")
    width = 0.2
    for axis, (title, read) in zip(axes, views, strict=True):
        for k, (token, label) in enumerate(_TOKENS.items()):
            spread = [Interval.of(read(row)) for row in rows if row["token"] == token]
            axis.bar(
                [i + (k - 1.5) * width for i in range(len(shares))],
                [x.mean for x in spread],
                width,
                yerr=[[x.mean - x.low for x in spread], [x.high - x.mean for x in spread]],
                color=colours[k],
                capsize=2,
                label=label,
                error_kw={"elinewidth": 1},
            )
        axis.set_xticks(range(len(shares)), [f"{100 * x:.0f} %" for x in shares])
        axis.set_xlabel("heads that hold everything")
        axis.set_title(title, fontsize=10.5)
        axis.grid(axis="y", alpha=0.35)
        axis.set_axisbelow(True)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=4, loc="lower center")
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure
