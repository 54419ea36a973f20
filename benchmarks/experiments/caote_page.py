"""The tables and pictures of docs/experiments/caote.md, from the raw results of caote.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import common
from interval import Interval

_TITLES = {"h2o": "H2O", "tova": "TOVA", "snapkv": "SnapKV"}
_FORMS = {"": "base", "caote+": "CAOTE", "fastcaote+": "FastCAOTE"}
_LOOKS = {"": ("#5b6570", "o"), "caote+": ("#d55e00", "s"), "fastcaote+": ("#0072b2", "^")}
_TASKS = {"needle": "a number in a text", "keys": "one of eight numbers in a text"}
_KINDS = {"right": "answers right", "tokens": "answer tokens right"}

Raw = dict[str, Any]


def publish(asked: common.Options, raw: Raw, bases: Mapping[str, str], forms: Sequence[str]) -> None:
    """Print and write everything."""
    parts = [
        "### Accuracy",
        _accuracy(raw, bases, forms),
        "![Accuracy](caote-accuracy.png)",
        "### Output error, from identical inputs",
        _errors(raw, bases, forms),
        "![Output error per layer](caote-error.png)",
        "### Logits on running text",
        _logits(raw, bases, forms),
        "### Rank correlation of CAOTE and FastCAOTE",
        _ranks(raw, bases),
        "![Rank correlation per layer and head](caote-rank.png)",
    ]
    for name, draw in (("accuracy", _draw_accuracy), ("error", _draw_error), ("rank", _draw_rank)):
        path = None if asked.out is None else asked.out / f"caote-{name}.png"
        common.paint(path, lambda draw=draw: draw(raw, bases, forms))  # type: ignore[misc]
    common.publish("caote", asked, raw, "\n\n".join(parts))


def _accuracy(raw: Raw, bases: Mapping[str, str], forms: Sequence[str]) -> str:
    parts = []
    s = raw["settings"]
    for task, found in raw["accuracy"].items():
        rows = []
        for base, policy in bases.items():
            for budget in map(str, raw["budgets"]):
                row = [_TITLES[base], budget]
                for kind in _KINDS:
                    plain = found["policies"][policy][budget][kind]
                    row.append(Interval.of(plain).percent())
                    for form in forms[1:]:
                        mine = found["policies"][form + policy][budget][kind]
                        row.append(_marked(Interval.between(mine, plain)))
                rows.append(row)
        head = ["base", "budget"]
        for label in _KINDS.values():
            head += [f"{label}: base", "CAOTE − base", "FastCAOTE − base"]
        tova = ", ".join(
            f"{100 * Interval.of(found['policies']['tova'][str(b)]['right']).mean:.1f} at {b}"
            for b in raw["budgets"]
        )
        full = ", ".join(
            f"{label} {Interval.of(found['full'][kind]).percent()}" for kind, label in _KINDS.items()
        )
        parts.append(
            f"**{_TASKS[task]}**, {s['contexts']} contexts of {found['tokens']:.0f} tokens on average. "
            f"Percent, 95 % bootstrap interval over contexts; differences are paired, in points, and bold "
            f"where 0 lies outside the interval. Full cache: {full}. (TOVA as published, all heads of a "
            f"layer alike, answers: {tova}.)\n\n{common.table(head, rows)}"
        )
    return "\n\n".join(parts)


def _errors(raw: Raw, bases: Mapping[str, str], forms: Sequence[str]) -> str:
    s = raw["settings"]
    views = [(f"blocks of {s['chunk']}, {source}", raw["blocks"][source]) for source in raw["blocks"]] + [
        (f"one at a time, {source}, {label}", raw["steps"][source][kind])
        for source in raw["steps"]
        for kind, label in (("later", "later queries"), ("own", "query at hand"))
    ]
    rows = []
    for label, found in views:
        for base, policy in bases.items():
            plain = _over_layers(found[policy])
            row = [label, _TITLES[base], f"{Interval.of(plain).mean:.3g}"]
            for form in forms[1:]:
                mine = _over_layers(found[form + policy])
                gap = Interval.change(mine, plain)
                better = sum(
                    sum(a) < sum(b) for a, b in zip(found[form + policy], found[policy], strict=True)
                )
                row += [_marked(gap), f"{better} of {len(found[policy])}"]
            least = found.get("best" + policy)
            row.append(_marked(Interval.change(_over_layers(least), plain)) if least else "")
            rows.append(row)
    head = [
        "inputs",
        "base",
        "error of base",
        "CAOTE",
        "layers better",
        "FastCAOTE",
        "layers better",
        "best choice",
    ]
    return (
        f"Relative L2 error of the attention output (heads concatenated), budget {s['text_budget']}, mean of "
        f"the layers; CAOTE and FastCAOTE as paired change of the mean, in percent of the base's, with a "
        f"95 % bootstrap interval over {s['texts']} texts.\n\n"
        f"{common.table(head, rows)}"
    )


def _logits(raw: Raw, bases: Mapping[str, str], forms: Sequence[str]) -> str:
    found, rows = raw["logits"], []
    for base, policy in bases.items():
        plain = found[policy]
        row = [_TITLES[base], f"{Interval.of(plain['kl']).mean:.4f}"]
        for form in forms[1:]:
            gap = Interval.between(found[form + policy]["kl"], plain["kl"])
            text = f"{gap.mean:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"
            row.append(f"**{text}**" if gap.clear else text)
        row += [f"{Interval.of(found[form + policy]['loss']).mean:.4f}" for form in forms]
        rows.append(row)
    head = ["base", "KL of base", "CAOTE − base", "FastCAOTE − base", "loss: base", "CAOTE", "FastCAOTE"]
    return (
        f"KL(full cache ‖ policy) of the next token and loss, nats, budget "
        f"{raw['settings']['text_budget']} of {raw['settings']['text_length']} tokens; loss of the full "
        f"cache {Interval.of(found['full']['loss']).mean:.4f}.\n\n{common.table(head, rows)}"
    )


def _ranks(raw: Raw, bases: Mapping[str, str]) -> str:
    rows = []
    for base in bases:
        for pair, label in (("fast", "CAOTE, FastCAOTE"), ("base", "CAOTE, base")):
            layers = raw["ranks"][base][pair]
            every = [x for layer in layers for x in layer]
            rows.append(
                [
                    f"{_TITLES[base]}: {label}",
                    f"{sum(every) / len(every):.3f}",
                    f"{min(every):.3f}",
                    *(f"{sum(layer) / len(layer):.3f}" for layer in layers),
                ]
            )
    layers = raw["ranks"]["h2o"]["fast"]
    head = ["Spearman of", "mean", "lowest head", *(f"layer {i}" for i in range(len(layers)))]
    return "Over the tokens that may go, mean over evictions and texts.\n\n" + common.table(head, rows)


def _marked(gap: Interval) -> str:
    return f"**{gap.percent(signed=True)}**" if gap.clear else gap.percent(signed=True)


def _over_layers(layers: list[list[float]]) -> list[float]:
    """Per text, the mean of the layers."""
    return [sum(column) / len(column) for column in zip(*layers, strict=True)]


def _draw_accuracy(raw: Raw, bases: Mapping[str, str], forms: Sequence[str]) -> Any:
    import matplotlib.pyplot as plt

    tasks, budgets = raw["accuracy"], raw["budgets"]
    figure, grid = plt.subplots(
        len(tasks), len(bases), figsize=(9.5, 2.9 * len(tasks)), sharex=True, sharey="row", squeeze=False
    )
    for row, (task, found) in zip(grid, tasks.items(), strict=True):
        for axis, (base, policy) in zip(row, bases.items(), strict=True):
            full = 100 * Interval.of(found["full"][raw["compared"]]).mean
            axis.axhline(full, color="#1f2328", linestyle="--", linewidth=1, label="full cache")
            for shift, form in enumerate(forms):
                colour, marker = _LOOKS[form]
                scores = [
                    Interval.of(found["policies"][form + policy][str(b)][raw["compared"]]) for b in budgets
                ]
                means = [100 * x.mean for x in scores]
                errors = [
                    [100 * (x.mean - x.low) for x in scores],
                    [100 * (x.high - x.mean) for x in scores],
                ]
                at = [b * (1 + 0.04 * (shift - 1)) for b in budgets]
                axis.errorbar(
                    at,
                    means,
                    errors,
                    color=colour,
                    marker=marker,
                    capsize=2,
                    label=_FORMS[form],
                    markersize=5,
                )
            axis.set_xscale("log", base=2)
            axis.set_xticks(budgets, [str(b) for b in budgets])
            axis.minorticks_off()
            axis.set_ylim(-3, 103)
            axis.grid(axis="y", alpha=0.35)
            axis.set_title(f"{_TASKS[task]}, {_TITLES[base]}")
        row[0].set_ylabel(f"{_KINDS[raw['compared']]}, %")
    for axis in grid[-1]:
        axis.set_xlabel("tokens held per KV head")
    grid[0][0].legend(frameon=False, loc="best")
    figure.tight_layout()
    return figure


def _draw_error(raw: Raw, bases: Mapping[str, str], forms: Sequence[str]) -> Any:
    import matplotlib.pyplot as plt

    source = "needles"
    views = {
        f"blocks of {raw['settings']['chunk']}, later queries": raw["blocks"][source],
        "one at a time, later queries": raw["steps"][source]["later"],
        "one at a time, query at hand": raw["steps"][source]["own"],
    }
    figure, grid = plt.subplots(len(views), len(bases), figsize=(9.5, 7.6), sharex=True, sharey="row")
    for row, (label, found) in zip(grid, views.items(), strict=True):
        for axis, (base, policy) in zip(row, bases.items(), strict=True):
            for form in forms:
                colour, marker = _LOOKS[form]
                errors = [sum(layer) / len(layer) for layer in found[form + policy]]
                axis.plot(errors, color=colour, marker=marker, markersize=5, label=_FORMS[form])
            if "best" + policy in found:
                least = [sum(layer) / len(layer) for layer in found["best" + policy]]
                axis.plot(least, color="#009e73", linestyle=":", label="best choice")
            axis.grid(axis="y", alpha=0.35)
            axis.set_xticks(range(len(errors)))
            axis.set_title(_TITLES[base])
        if "hand" in label:
            row[0].set_yscale("log")
        else:
            row[0].set_ylim(bottom=0)
        row[0].set_ylabel(f"relative error\n{label}", fontsize=9.5)
    for axis in grid[-1]:
        axis.set_xlabel("layer")
    handles, labels = grid[-1][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=4, loc="lower center")
    figure.tight_layout(rect=(0, 0.035, 1, 1))
    return figure


def _draw_rank(raw: Raw, bases: Mapping[str, str], forms: Sequence[str]) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(bases), figsize=(9.5, 3.1), layout="constrained")
    least = min(0.8, *(x for base in bases for layer in raw["ranks"][base]["fast"] for x in layer))
    for axis, base in zip(axes, bases, strict=True):
        layers = raw["ranks"][base]["fast"]
        image = axis.imshow(layers, vmin=least, vmax=1, cmap="viridis", aspect="auto")
        for i, layer in enumerate(layers):
            for j, x in enumerate(layer):
                colour = "white" if x < least + 0.6 * (1 - least) else "black"
                axis.text(j, i, f"{x:.2f}", ha="center", va="center", fontsize=7, color=colour)
        axis.set_title(_TITLES[base])
        axis.set_xlabel("KV head" if len(layers[0]) == 4 else "query head")
        axis.set_xticks(range(len(layers[0])))
        axis.set_yticks(range(len(layers)))
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="Spearman, CAOTE and FastCAOTE", shrink=0.9)
    return figure
