"""Contexts and questions of budgets.py through peers, each in its own environment, in one shot."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from asking import Context
from budget_rows import Row

PEERS: dict[str, tuple[str, Sequence[str], Sequence[float]]] = {
    "kvpress": (
        "kvpress_asked.py",
        (
            "KVzipPress",
            "KVzipPress(kvzip_plus_normalization=True)",
            "CompactorPress",
            "KeyDiffPress",
            "AdaKVPress(ExpectedAttentionPress)",
            "SnapKVPress",
        ),
        (0.25, 0.125),
    ),
    "transformers": (
        "transformers_asked.py",
        ("QuantizedCache(quanto, 4 bits)", "QuantizedCache(quanto, 2 bits)"),
        (1.0,),
    ),
}
"""Script in benchmarks/peers, what it is asked for, and the shares of the context's tokens."""


def run_peer(
    peer: str,
    python: str,
    model: Any,
    contexts: Sequence[Context],
    where: tuple[str, int, str, str],
    known: Collection[tuple[Any, ...]],
) -> Iterator[Row]:
    """The rows of what is not known yet.

    python: the interpreter of the peer's environment.
    where: model, length, task and haystack, as rows name them.
    known: keys of earlier rows; what has any is not run again.
    """
    script, methods, shares = PEERS[peer]
    done = {key[4] for key in known if key[:4] == where}
    job = {
        "model": model.name_or_path,
        "dtype": str(model.dtype).removeprefix("torch."),
        "methods": [method for method in methods if f"{peer}: {method}" not in done],
        "shares": shares,
        "contexts": [
            {
                "ids": context.ids,
                "questions": [
                    {"ids": q.ids, "answer": [token for answer in q.answers for token in answer]}
                    for q in context.questions
                ],
            }
            for context in contexts
        ],
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(job))
        path = Path(__file__).resolve().parents[1] / "peers" / script
        with subprocess.Popen([python, str(path), str(file)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                told = json.loads(line)
                yield Row(
                    *where,
                    f"{peer}: {told['method']}",
                    "model",
                    "full" if told["share"] == 1 else f"{100 * told['share']:g}%",
                    told["context"],
                    len(contexts[0].questions),
                    told["right"],
                    told["nbytes"],
                    told["full_nbytes"],
                    None,
                    told["tokens"],
                    chunk=where[1],
                )
        if process.returncode:
            raise SystemExit(f"{script} ended with {process.returncode}")
