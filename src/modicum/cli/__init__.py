"""The command line: one file per command. torch and transformers load inside them, so that help is quick."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import modicum
from modicum.cli import (
    calibrate,
    detect,
    distill,
    eval,
    fit,
    heads,
    keep,
    measure,
    policies,
    prune,
    report,
    run,
    search,
    serve,
    speech,
    stereo,
)
from modicum.cli.console import complain, warnings_for_people
from modicum.errors import ModicumError


class Commands(TyperGroup):
    """Turns what goes wrong into a line on stderr and an exit code: 2 for bad input, 130 for Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings_for_people():
                return super().invoke(ctx)
        except ModicumError as error:
            complain(f"error: {error}")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            complain("interrupted")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run.run)
app.command("policies")(policies.policies)
app.command("calibrate")(calibrate.calibrate)
app.command("heads")(heads.heads)
app.command("keep")(keep.keep)
app.command("prune")(prune.prune)
app.command("distill")(distill.distill)
app.command("search")(search.search)
app.command("measure")(measure.measure)
app.command("fit")(fit.fit)
app.add_typer(speech.app, name="speech")
app.add_typer(stereo.app, name="stereo")
app.add_typer(detect.app, name="detect")
app.command("eval")(eval.evaluate)
app.command("report")(report.report)
app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve.serve)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"modicum {modicum.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Run a language model with its KV cache under a hard memory budget."""


def main() -> None:
    """The `modicum` command."""
    app(prog_name="modicum")
