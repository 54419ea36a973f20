"""`modicum calibrate`: how many of its tokens each KV head of a model needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modicum.cli.console import complain, load, print_json, print_table
from modicum.cli.options import DeviceOption, DtypeOption, JsonOption
from modicum.errors import InputError

if TYPE_CHECKING:
    from modicum.kv.head_profile import HeadProfile


def calibrate(
    model: Annotated[str, typer.Argument(help="A model's name or folder, as for modicum run.")] = "smollm2",
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text file, or folder of .txt files, to calibrate on; by default texts of several kinds.",
            metavar="FOLDER",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Save the profile here too, for --policy 'calibrated(keydiff, profile=\"FILE\")'.",
            metavar="FILE",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a piece of text.")] = 900,
    texts: Annotated[int, typer.Option(min=1, help="Pieces of text that are read.")] = 8,
    top: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 12,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure how many of its tokens each KV head needs, and which, for policies such as calibrated+learned.

    Done once per model: the profile is kept in the user's cache folder and found again by the weights. Ctrl-C
    keeps what has been measured; the same command goes on from there.
    """
    if out is not None and not out.parent.is_dir():
        raise InputError(f"cannot write {out}: there is no folder {out.parent}")
    from modicum.weights.calibration import texts_in

    given = None if text is None else texts_in(text)
    lm, tokenizer = load(model, dtype, device)
    from modicum.kv import head_store
    from modicum.kv.calibration import calibrate as measure

    profile = measure(lm, tokenizer, given, tokens=tokens, most_texts=texts, progress=True)
    if out is not None:
        profile.save(out)
    if as_json:
        print_json(
            {
                "model": profile.model,
                "weights": profile.weights,
                "texts": profile.texts,
                "tokens": profile.tokens,
                "fractions": profile.fractions,
                "shares": profile.shares,
                "skipped": profile.skipped,
            }
        )
        return
    _table(profile, top)
    kept = head_store.profile_path(profile.weights)
    if profile.weights and kept.is_file():
        complain(f"kept as {kept}; policies such as calibrated+keydiff find it there")


def _table(profile: HeadProfile, top: int) -> None:
    fraction = 0.125
    table = profile.at(fraction)
    at = [(i, j) for i, n in enumerate(profile.heads) if i not in profile.skipped for j in range(n)]
    at.sort(key=lambda ij: -table[ij[0]][ij[1]])
    total = sum(table[i][j] for i, j in at)
    tenth = max(1, round(len(at) / 10))
    share = sum(table[i][j] for i, j in at[:tenth]) / total if total else 0.0
    rows = [[str(i), str(j), f"{table[i][j]:.1%}"] for i, j in at[:top]]
    title = (
        f"tokens that a KV head needs where {fraction:.1%} of all are kept; {tenth} of {len(at)} heads get "
        f"{share:.0%} of the slots"
    )
    print_table(["layer", "KV head", "share of its tokens"], rows, title=title)
