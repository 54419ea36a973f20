"""Compact speech recognizers: shared layers, sparse weights and few bits in one small file.

The names below load when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modicum.lazy_names import lazy_names

if TYPE_CHECKING:
    from modicum.speech.compact.byte_count import file_nbytes, planned_sections, sections
    from modicum.speech.compact.compressed import CompactRecognizer, CompressedTensor, compress_weights
    from modicum.speech.compact.compression import compress_recognizer
    from modicum.speech.compact.context import Context, model_context
    from modicum.speech.compact.embedded import embedded_decoder, embedded_recognizer
    from modicum.speech.compact.onnx_export import OnnxFiles, export_onnx
    from modicum.speech.compact.packed_file import load_packed, save_packed
    from modicum.speech.compact.packing import PackSettings, Trial, pack
    from modicum.speech.compact.pruning import PruningSettings
    from modicum.speech.compact.refining import RefiningRecipe, refine
    from modicum.speech.compact.sanm import SanmEncoder, SanmSettings
    from modicum.speech.compact.sharing import sharing_map
    from modicum.speech.compact.streaming import StreamingRecognizer
    from modicum.speech.compact.word_search import WordSearch, read_words

_HOMES = {
    "byte_count": ("file_nbytes", "planned_sections", "sections"),
    "compressed": ("CompactRecognizer", "CompressedTensor", "compress_weights"),
    "compression": ("compress_recognizer",),
    "context": ("Context", "model_context"),
    "embedded": ("embedded_decoder", "embedded_recognizer"),
    "onnx_export": ("OnnxFiles", "export_onnx"),
    "packed_file": ("load_packed", "save_packed"),
    "packing": ("PackSettings", "Trial", "pack"),
    "pruning": ("PruningSettings",),
    "refining": ("RefiningRecipe", "refine"),
    "sanm": ("SanmEncoder", "SanmSettings"),
    "sharing": ("sharing_map",),
    "streaming": ("StreamingRecognizer",),
    "word_search": ("WordSearch", "read_words"),
}

__all__ = [  # noqa: RUF022  # in the order of the reader's interest
    "SanmSettings",
    "SanmEncoder",
    "sharing_map",
    "compress_recognizer",
    "RefiningRecipe",
    "PruningSettings",
    "refine",
    "compress_weights",
    "CompactRecognizer",
    "CompressedTensor",
    "save_packed",
    "load_packed",
    "file_nbytes",
    "sections",
    "planned_sections",
    "pack",
    "PackSettings",
    "Trial",
    "export_onnx",
    "OnnxFiles",
    "StreamingRecognizer",
    "model_context",
    "Context",
    "WordSearch",
    "read_words",
    "embedded_recognizer",
    "embedded_decoder",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, globals())
