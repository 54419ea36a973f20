"""`modicum keep`: a picture of which positions each layer and head kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli.console import load, print_json, read_text
from modicum.cli.options import (
    BudgetOption,
    ChunkOption,
    DeviceOption,
    DtypeOption,
    EvictEveryOption,
    FileOption,
    JsonOption,
    ModelOption,
    PolicyOption,
    RecentOption,
    SampleOption,
    SinkOption,
    cache_settings,
)
from modicum.errors import InputError

if TYPE_CHECKING:
    from modicum.kv.cache import BudgetCache

_COLUMNS = 720  # of a panel: beyond that, neighbouring positions share one


def keep(
    prompt: Annotated[str | None, typer.Argument(help="The prompt, if not from a file.")] = None,
    prompt_file: FileOption = None,
    sample: SampleOption = False,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The picture (.png, .svg, .pdf).", metavar="FILE")
    ] = Path("kept.png"),
    model: ModelOption = "reference",
    policy: PolicyOption = "auto",
    budget: BudgetOption = "2048",
    chunk: ChunkOption = 512,
    n_sink: SinkOption = 4,
    recent: RecentOption = 32,
    evict_every: EvictEveryOption = 1,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Read a prompt and draw which of its positions each layer and KV head kept."""
    text = _text(prompt, prompt_file, sample)
    settings = cache_settings(policy, budget, chunk, n_sink, recent, evict_every)
    if not out.parent.is_dir():
        raise InputError(f"cannot write {out}: there is no folder {out.parent}")
    lm, tokenizer = load(model, dtype, device)
    from modicum.generation.generate import prefill

    cache = prefill(lm, tokenizer, text, progress=not as_json, **settings)
    title = f"{model}: {settings['policy']}, budget {budget}, {cache.seen:,} tokens seen"
    try:
        draw(cache, title).savefig(out, dpi=150)
    except (OSError, ValueError) as error:  # ValueError: a format that matplotlib does not write
        raise InputError(f"cannot write {out}: {error}") from error
    kept = [layer[0].tolist() for layer in cache.held]
    share = sum(map(sum, kept)) / (sum(map(len, kept)) * cache.seen)
    if as_json:
        print_json(
            {
                "out": str(out),
                "model": model,
                "policy": str(settings["policy"]),
                "budget": budget,
                "seen": cache.seen,
                "kept_share": share,
                "held": kept,
            }
        )
    else:
        print(f"{out}: {share:.1%} of {cache.seen:,} tokens kept, on average over layers and KV heads")


def _text(prompt: str | None, path: Path | None, sample: bool) -> str:
    if (prompt is not None) + (path is not None) + sample != 1:
        raise InputError("give one prompt: as an argument, by --prompt-file, or by --sample")
    if path is not None:
        return read_text(path)
    if prompt is not None:
        if not prompt.strip():
            raise InputError("the prompt is empty: give some text")
        return prompt
    from modicum.texts import sample_text

    return sample_text()


def draw(cache: BudgetCache, title: str) -> Any:
    """A matplotlib Figure of row 0: a panel per layer, a line per KV head, dark where positions were kept."""
    import math

    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    layers = [i for i, held in enumerate(cache.held) if held.shape[1]]
    count = len(layers)
    across = 1 if count <= 8 else 2 if count <= 24 else 4
    down = math.ceil(count / across)
    heads = max(layer.shape[1] for layer in cache.held)
    height = min(max(0.16 * heads + 0.35, 0.6), 1.6)
    figure = Figure(figsize=(max(9.0, 4.5 * across), 1.2 + height * down), layout="constrained")
    panels = figure.subplots(down, across, sharex=True, squeeze=False)
    # Few kept among many are to be seen too: hence the power.
    norm, image = PowerNorm(0.4, 0, 1), None
    for index, panel in enumerate(panels.T.flat):  # layers run down the columns
        if index >= count:
            panel.set_visible(False)
            continue
        shares = kept_shares(cache, layers[index])
        extent = (0, cache.seen, shares.shape[0] - 0.5, -0.5)
        image = panel.imshow(
            shares, aspect="auto", interpolation="nearest", cmap="Blues", norm=norm, extent=extent
        )
        panel.set_ylabel(f"{layers[index]}", rotation=0, ha="right", va="center")
        panel.set_yticks(range(shares.shape[0]) if shares.shape[0] <= 8 else [])
        panel.tick_params(labelsize=6)
    for column in range(across):
        last = max(r for r in range(down) if column * down + r < count)
        panels[last, column].tick_params(labelbottom=True)
        panels[last, column].set_xlabel("position")
    figure.suptitle(title, fontsize="medium")
    figure.supylabel("layer; a line per KV head", fontsize="small")
    if image is not None:
        figure.colorbar(image, ax=panels, label="share kept", fraction=0.03, pad=0.01)
    return figure


def kept_shares(cache: BudgetCache, layer: int) -> Any:
    """[H_kv, columns] numpy: of the positions in each column, the share that row 0 holds."""
    import numpy as np

    width = min(_COLUMNS, cache.seen)
    positions = cache.positions(layer)[0].numpy()  # [H, N], -1 for none
    column = np.arange(cache.seen) * width // cache.seen  # of each position
    size = np.bincount(column, minlength=width)
    rows = [np.bincount(column[head[head >= 0]], minlength=width) for head in positions]
    return np.stack(rows) / size
