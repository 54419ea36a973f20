"""`modicum heads`: which heads of a model retrieve."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modicum.cli.console import complain, load, print_table
from modicum.cli.options import DeviceOption, DtypeOption, JsonOption, ModelOption
from modicum.errors import InputError

if TYPE_CHECKING:
    from modicum.kv.heads import HeadScores


def heads(
    model: ModelOption = "reference",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Save the scores, for --policy 'razor(heads=\"FILE\")'.", metavar="FILE"
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Length of the random text that is repeated.")] = 400,
    copies: Annotated[int, typer.Option(help="How often it stands.")] = 4,
    seeds: Annotated[int, typer.Option(min=1, help="Random texts to average over.")] = 1,
    top: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 24,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Probe which KV heads look back at earlier copies of what they read (RazorAttention).

    Echo: weight on the same token one copy earlier; induction: on the token after it. With --json, prints
    what --out saves.
    """
    if out is not None and not out.parent.is_dir():
        raise InputError(f"cannot write {out}: there is no folder {out.parent}")
    lm, tokenizer = load(model, dtype, device)
    from modicum.kv.heads import probe

    scores = probe(
        lm,
        tokens=tokens,
        copies=copies,
        seeds=range(seeds),
        exclude=tokenizer.all_special_ids,
        progress=True,
    )
    if out is not None:
        try:
            scores.save(out)
        except OSError as error:
            raise InputError(f"cannot write {out}: {error.strerror or error}") from error
    if as_json:
        print(_saved(scores), end="")
        return
    _table(scores, top)
    if out is not None:
        complain(f"saved to {out}; use it by --policy 'razor(heads=\"{out}\")'")


def _saved(scores: HeadScores) -> str:
    """What `save` writes, so that the output redirected to a file is a file of scores."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.json"
        scores.save(path)
        return path.read_text(encoding="utf-8")


def _table(scores: HeadScores, top: int) -> None:
    from modicum.kv.policies.razor import RazorAttention

    chosen = RazorAttention().retrieval(scores)
    at = [(i, j) for i, n in enumerate(scores.heads) if i not in scores.skipped for j in range(n)]
    at.sort(key=lambda ij: (not chosen[ij[0]][ij[1]], -scores.induction[ij[0]][ij[1]]))
    rows = [
        [
            str(i),
            str(j),
            f"{scores.echo[i][j]:.3f}",
            f"{scores.induction[i][j]:.3f}",
            "yes" if chosen[i][j] else "",
        ]
        for i, j in at[:top]
    ]
    retrieve = sum(map(sum, chosen))
    title = f"{retrieve} of {len(at)} KV heads retrieve (RazorAttention's defaults)"
    if len(at) > top:
        title += f"; the first {top}"
    print_table(["layer", "KV head", "echo", "induction", "retrieves"], rows, title=title)
