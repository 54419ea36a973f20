"""GgufFile: a model in llama.cpp's file format, checked before transformers reads it.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: a header with key-value
pairs and the names, shapes and types of the tensors, then their data. transformers reads the data. This
module reads the header, because a damaged file fails inside transformers with errors that do not say so.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from modicum.errors import ModelError

SUFFIX = ".gguf"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 8
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


@dataclass(frozen=True)
class GgufFile:
    """A file whose header is whole and whose tensors are all there."""

    path: Path
    metadata: dict[str, Any]
    """The key-value pairs, such as "general.architecture"."""

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Check the installation, read the header, and compare the tensors with the file's size.

        Raises:
            ModelError: a package is missing, or the file is not GGUF, truncated, corrupted, or one of several
                parts.
        """
        check_packages()
        if _SPLIT.search(path.name):
            raise ModelError(
                f"{str(path)!r} is one part of a split model, which transformers cannot read; join the parts "
                "with llama.cpp's llama-gguf-split --merge, and give the joined file."
            )
        try:
            with path.open("rb") as file:
                metadata, end = _Header(file, path).read()
        except OSError as error:
            raise ModelError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from error
        size = path.stat().st_size
        if size < end:
            raise _damaged(path, f"it has {size:,} bytes, its header calls for {end:,}")
        return cls(path, metadata)

    @property
    def architecture(self) -> str:
        """What the file calls the kind of model, such as "llama"; "" if it does not say."""
        return str(self.metadata.get("general.architecture", ""))

    def special_tokens(self) -> dict[str, str]:
        """The tokens that the file names by id, by their names in transformers, such as "eos_token"."""
        tokens = self.metadata.get("tokenizer.ggml.tokens", [])
        names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        ids = {name: self.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
        return {name: tokens[i] for name, i in ids.items() if isinstance(i, int) and i < len(tokens)}


def check_packages() -> None:
    """Raises a ModelError unless the packages with which transformers reads GGUF are installed."""
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"a GGUF file needs the package {' and the package '.join(missing)}; "
            "install what is missing: pip install 'modicum[gguf]'."
        )


def in_folder(folder: Path) -> Path | None:
    """The one GGUF file of a folder; None if there is none.

    Raises:
        ModelError: there are several.
    """
    files = sorted(path for path in folder.glob(f"*{SUFFIX}") if path.is_file())
    if len(files) > 1:
        raise ModelError(
            f"the folder {str(folder)!r} holds {len(files)} GGUF files; give the path of one, such as "
            f"{str(files[0])!r}."
        )
    return files[0] if files else None


def load_options(config: Any) -> dict[str, Any]:
    """What `from_pretrained` needs to unpack all weights, and not to parse the file's config again."""
    import transformers

    # Since 5.24 weights may stay packed where a kernel for them is installed; that came with this class.
    settings = getattr(transformers, "GgufConfig", None)
    return {"config": config} | (
        {} if settings is None else {"quantization_config": settings(dequantize=True)}
    )


@contextmanager
def bars_that_can_be_silenced() -> Iterator[None]:
    """Let transformers' setting silence its bar over the tensors of a GGUF file, which ignores it."""
    from transformers import modeling_gguf_pytorch_utils as reading
    from transformers.utils.logging import tqdm

    module: Any = reading
    before = getattr(module, "tqdm", None)
    module.tqdm = tqdm
    try:
        yield
    finally:
        module.tqdm = before


class _Header:
    """Reads a header from a file that may end, or lie, at any byte."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.left = path.stat().st_size

    def read(self) -> tuple[dict[str, Any], int]:
        """The key-value pairs, and the size in bytes that the file must have."""
        if self._bytes(4) != b"GGUF":
            raise ModelError(f"{str(self.path)!r} is not a GGUF file: it does not begin with 'GGUF'.")
        version = self._number("I")
        if version not in _VERSIONS:
            raise ModelError(
                f"{str(self.path)!r} has GGUF version {version}; versions 2 and 3 (little-endian) are read. "
                "Convert the model again with a current llama.cpp."
            )
        num_tensors, num_pairs = self._number("Q"), self._number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self._string()
            metadata[key] = self._value(self._number("I"))
        needed = max((self._tensor() for _ in range(num_tensors)), default=0)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise _damaged(self.path, f"it gives an alignment of {alignment!r}")
        start = -(-self.file.tell() // alignment) * alignment
        return metadata, start + needed if needed else 0

    def _tensor(self) -> int:
        """Where the next tensor's data ends, counted from the start of all data."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._string()
        num_dimensions = self._number("I")
        if num_dimensions > _MOST_DIMENSIONS:
            raise _damaged(self.path, f"its tensor {name!r} has {num_dimensions} dimensions")
        shape = [self._number("Q") for _ in range(num_dimensions)]
        kind, offset = self._number("I"), self._number("Q")
        try:
            block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except ValueError as error:
            raise ModelError(
                f"{str(self.path)!r} stores the tensor {name!r} in type {kind}, which the installed package "
                "gguf does not know; upgrade it, or quantise the model to another type."
            ) from error
        return int(offset + prod(shape) // block * nbytes)

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            kind, count = self._number("I"), self._number("Q")
            if kind in _SCALARS:
                form = f"<{count}{_SCALARS[kind]}"
                # Asked for before it is unpacked: a damaged count may be larger than any memory.
                data = self._bytes(count * struct.calcsize(f"<{_SCALARS[kind]}"))
                return list(struct.unpack(form, data))
            return [self._value(kind) for _ in range(count)]
        raise _damaged(self.path, f"it has a value of type {kind}, and GGUF has types 0 to 12")

    def _number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self._bytes(struct.calcsize(f"<{form}")))[0]

    def _string(self) -> str:
        # Some published vocabularies hold pieces that are not whole characters.
        return self._bytes(self._number("Q")).decode("utf-8", errors="replace")

    def _bytes(self, count: int) -> bytes:
        self.left -= count
        if self.left < 0:
            raise _damaged(self.path, "it ends within its header")
        return self.file.read(count)


def _damaged(path: Path, reason: str) -> ModelError:
    return ModelError(f"{str(path)!r} is truncated or corrupted: {reason}; download or convert it again.")
