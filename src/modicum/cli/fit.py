"""`modicum fit`: what weights and cache give up so that both fit a memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modicum.cli.console import complain, load, print_json, print_table, progress_bar, settings_as_options
from modicum.cli.options import DeviceOption, DtypeOption, JsonOption
from modicum.errors import InputError

if TYPE_CHECKING:
    from modicum.fit.fit_report import FitReport

_SETTINGS = (
    "weights",
    "stores",
    "policy",
    "method",
    "tasks",
    "task_share",
    "sequences",
    "length",
    "probes",
    "probe_length",
    "samples",
    "candidates",
)


def fit(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder, a .gguf file, a name on the Hub, reference (embedded), or smollm2 (a package)."
        ),
    ],
    memory: Annotated[
        str, typer.Option(help='What weights and cache may take together, such as "64MiB".', metavar="SIZE")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the model goes.", metavar="FOLDER")],
    text: Annotated[
        Path | None,
        typer.Option(help="Text to fit to: a file or a folder of .txt files; else the sample text."),
    ] = None,
    context: Annotated[
        int, typer.Option(help="Tokens of the longest text, with its question and answer.")
    ] = 8192,
    batch: Annotated[int, typer.Option(help="Sequences at a time, each with a cache.")] = 1,
    weights: Annotated[
        str, typer.Option(help="What the weights of a layer's attention and of its MLP may be.")
    ] = "dense,50%,60%,70%,2:4",
    stores: Annotated[str, typer.Option(help="What the cache's slots may be.")] = "model,int8,k8v4,int4",
    policy: Annotated[
        str, typer.Option(help="What the cache keeps; auto divides slots by the calibrated head profile.")
    ] = "auto",
    method: Annotated[str, typer.Option(help="How weights are pruned: wanda, sparsegpt or alps.")] = "wanda",
    tasks: Annotated[
        str | None,
        typer.Option(
            help='Generated questions that must stay answered ("" for none); else needles in the text.',
            show_default=False,
        ),
    ] = None,
    task_share: Annotated[float, typer.Option(help="Weight of answers against running text, 0 to 1.")] = 0.5,
    sequences: Annotated[int, typer.Option(help="Calibration sequences.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 512,
    probes: Annotated[
        int, typer.Option(help="Texts that errors are measured on, and as many with questions.")
    ] = 4,
    probe_length: Annotated[int, typer.Option(help="Tokens of each; at most the context.")] = 2048,
    samples: Annotated[int, typer.Option(help="Assembled models that the predictor is checked on.")] = 15,
    candidates: Annotated[int, typer.Option(help="Plans that are measured before one is taken.")] = 6,
    finetune: Annotated[
        bool, typer.Option("--finetune", help="Distil the model as it was into the result, masks kept.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of texts, questions and samples.")] = 0,
    library: Annotated[
        Path | None,
        typer.Option(help="Where variants are kept; else the user's cache folder.", metavar="FOLDER"),
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Fit a language model and its cache into a memory, at the least predicted loss, and write it.

    For each layer the sparsity of its weights is chosen, for the cache its slots and their bits. The folder
    runs by modicum run --model FOLDER with no other option. What was measured is kept: a run that was
    stopped, or one for another memory, goes on from there. A page, fit.html, shows what each layer gave up.
    """
    from modicum.fit.settings import TASKS, FitSettings, Target

    with settings_as_options(*_SETTINGS, "memory", "context", "batch"):
        target = Target(memory, context, batch)
        settings = FitSettings(
            weights=tuple(x.strip() for x in weights.split(",") if x.strip()),
            stores=tuple(x.strip() for x in stores.split(",") if x.strip()),
            policy=policy,
            method=method,
            tasks=TASKS if tasks is None else tasks,
            task_share=task_share,
            sequences=sequences,
            length=length,
            probes=probes,
            probe_length=probe_length,
            samples=samples,
            candidates=candidates,
            seed=seed,
        )
    from modicum.weights.new_folder import check_new

    check_new(out)
    if text is not None and not text.exists():
        raise InputError(f"there is no {text} to fit to: give a text file, or a folder of *.txt files")
    lm, tokenizer = load(model, dtype, device)
    from modicum.fit.entry import fit as run
    from modicum.fit.page import write_fit_page

    with settings_as_options(*_SETTINGS), progress_bar() as progress:
        report = run(
            lm,
            tokenizer,
            text,
            out,
            target,
            settings,
            library=library,
            teacher=model if finetune else None,
            progress=progress,
        )
    page = write_fit_page(report, model, out)
    if as_json:
        print_json(report.to_dict())
        return
    _summary(report, page, out)


def _summary(report: FitReport, page: Path | None, out: Path) -> None:
    from modicum.kv.budget import format_size

    plan = report.plan
    layers: dict[str, dict[str, str]] = {}
    for name, option in plan.options.items():
        layer, _, kind = name.partition(".")
        layers.setdefault(layer, {})[kind] = option
    rows = [[layer, kinds.get("attention", "–"), kinds.get("mlp", "–")] for layer, kinds in layers.items()]
    print_table(["layer", "attention", "MLP"], rows, title="Weights removed")
    print(
        f"cache: {plan.cache.tokens:,} slots per head ({plan.cache.share:.1%} of {plan.cache.context:,})"
        f" in {plan.cache.store}, {format_size(report.cache_nbytes)} each of {report.target.batch}"
    )
    print(
        f"weights {format_size(report.weights_nbytes)}, together {format_size(report.nbytes)} of "
        f"{format_size(report.target.nbytes)}; as it was {format_size(report.dense_nbytes)}"
    )
    errors = report.errors
    print(
        f"KL of the next token {errors.text:.4f} nats in text, {errors.answers:.4f} in answers, of which "
        f"{errors.kept:.0%} are kept; predicted loss {plan.predicted:.4f}, measured {report.loss:.4f}"
    )
    check = report.check
    if check.samples:
        print(
            f"Kendall's tau over {check.samples} assembled models: predictor {check.tau:.2f}, "
            f"bytes alone {check.bytes_tau:.2f}"
        )
    print(f"{report.seconds:.0f} s; {format_size(report.file_bytes)} packed: {out}")
    if page is not None:
        complain(f"what each layer gave up: {page}")
    complain(f"use it as --model {out}")
