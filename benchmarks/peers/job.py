"""Job: what a peer is asked to run, and what it answers, as JSON between two environments.

It imports neither modicum nor a peer. The driver writes one job file; a peer reads it and prints a line of
JSON for each sample on its standard output, as soon as that sample is done.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ask:
    """A sample's tokens, the same for every system."""

    key: str
    """The task's expression and the index."""
    context: list[int]
    question: list[int]
    most: int
    """New tokens at most."""
    logits: bool = False
    """Whether the logits before the first new token are wanted."""


@dataclass(frozen=True)
class Setting:
    """One way of running a sample."""

    policy: str
    """In the system's own words; "full" is its plain cache."""
    budget: str
    """For people: "12.5%", "4 bits" or "full"."""
    share: float | None = None
    """Of the context's tokens, to be held when the context was read."""
    chunk: int | None = None
    """Tokens taken in at a time; None for all at once."""
    grown: bool = False
    """As a press has it (ours only): room for question and answer on top, no protected tokens."""


@dataclass(frozen=True)
class Job:
    """Samples, settings, and which of them are wanted."""

    model: str
    dtype: str
    ends: list[int]
    """Tokens that end an answer."""
    asks: list[Ask]
    settings: list[Setting]
    wanted: list[tuple[int, int]]
    """Pairs of places in `asks` and `settings`, in the order in which to run."""

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Job:
        """What `write` wrote."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            **{
                **raw,
                "asks": [Ask(**a) for a in raw["asks"]],
                "settings": [Setting(**s) for s in raw["settings"]],
                "wanted": [(a, s) for a, s in raw["wanted"]],
            }
        )


@dataclass(frozen=True)
class Result:
    """What one sample under one setting gave and cost; the same numbers as a row's."""

    ask: int
    setting: int
    tokens: list[int] = field(default_factory=list)
    context_bytes: int = 0
    held_bytes: int = 0
    peak_bytes: int = 0
    held_tokens: tuple[int, int] = (0, 0)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    refused: str = ""
    """Why the peer cannot do this; the numbers are then void."""
    extra: dict[str, Any] = field(default_factory=dict)
    logits: list[float] = field(default_factory=list)


class UnsupportedError(Exception):
    """The peer cannot do what is asked, by its own word or by an error that it raised."""


def main(run: Callable[[Job, Ask, Setting], Result]) -> None:
    """A peer's command: the job file that it is given, on one thread, after one sample to warm up."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    job = Job.read(Path(sys.argv[1]))
    if job.wanted:
        run(job, job.asks[job.wanted[0][0]], Setting("full", "full"))
    serve(run, job)


def serve(run: Callable[[Job, Ask, Setting], Result], job: Job) -> None:
    """Run what is wanted and print the results; what else is printed meanwhile goes to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    refused: dict[int, str] = {}
    for a, s in job.wanted:
        if s not in refused:
            try:
                result = run(job, job.asks[a], job.settings[s])
                out.write(json.dumps({**asdict(result), "ask": a, "setting": s}) + "\n")
            except UnsupportedError as error:
                refused[s] = str(error)
        if s in refused:
            out.write(json.dumps(asdict(Result(a, s, refused=refused[s]))) + "\n")
        out.flush()
