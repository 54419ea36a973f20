"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from modicum.kv.cache_settings import CacheSettings
    from modicum.kv.policy import Policy

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A folder, a .gguf file, a name on the Hub, reference (embedded), or smollm2 (a package).",
        metavar="NAME",
    ),
]
PolicyOption = Annotated[
    str, typer.Option("--policy", "-p", help='What to keep, such as "keydiff" or "caote+snapkv(window=16)".')
]
BudgetOption = Annotated[
    str,
    typer.Option(
        "--budget",
        "-b",
        help='Tokens per KV head (2048), a share of the text ("12.5%"), or a size for it all ("64MiB").',
    ),
]
ChunkOption = Annotated[int, typer.Option(help="Tokens of the prompt taken in at a time.")]
SinkOption = Annotated[int, typer.Option("--n-sink", help="First tokens that always stay.")]
RecentOption = Annotated[int, typer.Option(help="Newest tokens that always stay.")]
EvictEveryOption = Annotated[int, typer.Option("--evict-every", help="Tokens evicted at a time in decode.")]
PositionsOption = Annotated[
    str,
    typer.Option(
        help="original, or renumbered: each token's rank among those held, for streams of any length."
    ),
]
StoreOption = Annotated[
    str,
    typer.Option(
        help="model: keys and values as the model gives them; int8 or fp8: in 8 bits; k8v4: keys in 8 bits, "
        "values in 4; int4: in 4 bits, rotated."
    ),
]
RunPolicyOption = Annotated[
    str | None,
    typer.Option(
        "--policy",
        "-p",
        help='What to keep, such as "keydiff"; by default what the model\'s folder says (modicum fit), else '
        "auto.",
        show_default=False,
    ),
]
RunBudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget",
        "-b",
        help='Tokens per KV head (2048), a share of the text ("12.5%"), or a size for it all ("64MiB"); by '
        "default what the model's folder says, else 2048.",
        show_default=False,
    ),
]
RunStoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        help="model: keys and values as the model gives them; int8 or fp8: in 8 bits; k8v4: keys in 8 bits, "
        "values in 4; int4: in 4 bits, rotated. By default what the model's folder says, else model.",
        show_default=False,
    ),
]
CompileOption = Annotated[
    bool, typer.Option("--compile", help="Compile the decode step: the first takes long, the others less.")
]
DtypeOption = Annotated[str, typer.Option(help="Of the weights: auto, float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option(help="Such as cpu or cuda; auto takes a GPU if there is one.")]
FileOption = Annotated[
    Path | None,
    typer.Option(
        "--prompt-file", "-f", help="Read the prompt from a UTF-8 file (- for stdin).", metavar="FILE"
    ),
]
SampleOption = Annotated[
    bool, typer.Option("--sample", help="Read a long text: part of the Python language reference.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


def cache_defaults(model: str) -> CacheSettings:
    """What a model's folder says of its cache, else the defaults."""
    from modicum.kv.cache_settings import CacheSettings
    from modicum.run_settings import RunSettings

    found = RunSettings.read(Path(model))
    return CacheSettings() if found is None else found.cache


def cache_settings(
    policy: str | Policy,
    budget: str,
    chunk: int,
    n_sink: int,
    recent: int,
    evict_every: int,
    positions: str = "original",
    store: str = "model",
    compile: bool = False,
) -> dict[str, Any]:
    """The arguments of a cache, checked before a model takes its time to load."""
    import modicum.kv.policies  # noqa: F401  # registers them
    from modicum.kv.plan import budget_for
    from modicum.kv.registry import parse_policy
    from modicum.kv.store import Store
    from modicum.kv.turning import check_numbering

    settings = {"chunk": chunk, "n_sink": n_sink, "recent": recent, "evict_every": evict_every}
    chosen = parse_policy(policy)
    Store(store).check_policy(chosen)
    return {
        "policy": chosen,
        "budget": budget_for(chosen, budget, **settings),
        "positions": check_numbering(positions),
        "store": Store(store).name,
        "compile": compile,
    }
