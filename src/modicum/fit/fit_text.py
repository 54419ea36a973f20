"""FitText: the tokens that a fit learns from, and those that it measures errors on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from modicum.distill.sequences import with_questions
from modicum.errors import InputError
from modicum.fit.haystack_questions import HaystackQuestions
from modicum.fit.probe import Probes, windows
from modicum.fit.settings import FitSettings
from modicum.texts import sample_text
from modicum.weights.calibration import texts_in

_HELD_BACK = 4
"""One part of so many of the text is for probes, of running text and of questions; calibration sequences, of
text and of questions, are of the rest."""
Tell = Callable[[str, int, int], object]


@dataclass(frozen=True)
class FitText:
    """A text, divided.

    Attributes:
        learned: tokens to calibrate and to train on; needles of questions to learn from stand in them.
        held: tokens that nothing is learned from; needles of questions to measure on stand in them.
    """

    learned: list[int]
    held: list[int]

    @classmethod
    def read(cls, path: Path | None, tokenizer: Any, short: int, length: int) -> FitText:
        """Read and divide a text.

        Args:
            path: a file, or a folder of .txt files; None for the sample text.
            short: tokens of a calibration sequence.
            length: tokens of the longest probe.

        Raises:
            InputError: it has too few tokens, or a file cannot be read.
        """
        ids: list[int] = []
        for one in [sample_text()] if path is None else texts_in(path):
            ids += tokenizer(one, add_special_tokens=False, verbose=False)["input_ids"]
        held = max(len(ids) // _HELD_BACK, length)
        if len(ids) - held < short:
            raise InputError(
                f"the text has {len(ids):,} tokens, of which {held:,} are held back to measure errors on, "
                f"and a calibration sequence takes {short:,}: give more text, or a smaller length "
                "(--length) and probe_length (--probe-length)"
            )
        return cls(ids[:-held], ids[-held:])

    def sequences(
        self,
        model: Any,
        tokenizer: Any,
        tasks: str,
        settings: FitSettings,
        length: int,
        tell: Tell,
    ) -> Tensor:
        """Calibration sequences [n, length], some of them questions with the model's answers."""
        num = min(settings.sequences, len(self.learned) // length)
        found = windows(self.learned, num, length)
        if not tasks or num < 2:
            return found

        def answer(prompts: Sequence[Sequence[int]], most: int) -> list[list[int]]:
            return [_answer(model, prompt, most) for prompt in prompts]

        with _naming("--length"), _file(tokenizer, self.learned) as haystack:
            questions = HaystackQuestions(tasks, settings.task_share, settings.seed, haystack)
            asked = with_questions(
                found, tokenizer, questions, answer, lambda done, total: tell("answering", done, total)
            )
            return asked.ids

    def probes(
        self,
        model: Any,
        tokenizer: Any,
        tasks: str,
        settings: FitSettings,
        length: int,
        tell: Tell,
    ) -> Probes:
        """Probes of so many tokens, with questions of their own for each length."""
        with _naming("--probe-length"), _file(tokenizer, self.held) as haystack:
            return Probes(
                model,
                tokenizer,
                windows(self.held, settings.probes, length),
                tasks,
                haystack,
                settings.seed + length,
                lambda done, total: tell("asking the reference", done, total),
            )


@contextmanager
def _naming(option: str) -> Iterator[None]:
    """Name the options in errors of the questions that are asked."""
    try:
        yield
    except InputError as error:
        raise InputError(
            f"{error} (the length is fit's {option}, the questions are its --tasks; --tasks '' asks none)"
        ) from error


@contextmanager
def _file(tokenizer: Any, ids: Sequence[int]) -> Iterator[Path]:
    """A file of tokens' text, as tasks take it. Its name is new, as tasks remember texts by their names."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        path.write_text(tokenizer.decode(ids), encoding="utf-8")
        yield path


@torch.no_grad()
def _answer(model: Any, prompt: Sequence[int], most: int) -> list[int]:
    ids = torch.tensor([list(prompt)], device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False)
    found: list[int] = out[0, len(prompt) :].tolist()
    return found
