"""Answer: one answer being made (or a batch of them, row by row), step by step."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import GenerationConfig

from modicum.errors import InputError
from modicum.generation.beams import search
from modicum.generation.inputs import Block
from modicum.generation.interrupt import Interrupt
from modicum.generation.reader import Reader
from modicum.generation.result import FinishReason, Generation, Timings, held_range, memory_of
from modicum.generation.rules import Rules
from modicum.generation.text import decode
from modicum.kv.call import cuts
from modicum.progress import Progress, reporting


@dataclass(frozen=True)
class Settings:
    """What all answers of one call have in common."""

    tokenizer: Any
    config: GenerationConfig
    stop_on_eos: bool = True
    progress: Progress = None

    @property
    def new_tokens(self) -> int:
        """The limit on an answer's length."""
        return int(self.config.max_new_tokens or 0)


@dataclass(frozen=True)
class Spent:
    """A prefill done beforehand and shared by several answers; each counts it as its own."""

    seconds: float = 0.0
    tokens: int = 0


class Answer:
    """Takes in blocks of prompt, then decodes: `steps` does the work, `results` is what has come of it."""

    def __init__(
        self,
        reader: Reader,
        blocks: list[Block],
        settings: Settings,
        interrupt: Interrupt,
        spent: Spent = Spent(),
    ) -> None:
        self.reader, self.blocks, self.settings, self.interrupt, self.spent = (
            reader,
            blocks,
            settings,
            interrupt,
            spent,
        )
        told = reader.transcript
        if not blocks and told.logits is None:
            raise InputError("there is nothing to go on from: give a prompt or a question")
        history = [told.ids, *(block.ids for block in blocks)]
        valid = [told.valid, *(torch.ones_like(b.ids).bool() if b.valid is None else b.valid for b in blocks)]
        self.history = torch.cat(history, dim=1).to(reader.device)
        self.valid = torch.cat(valid, dim=1).to(reader.device)
        self.rules = Rules.read(
            reader.model, settings.tokenizer, self.history, self.valid, settings.config, settings.stop_on_eos
        )
        if self.rules.beams > 1 and not blocks:
            raise InputError("beam search has nothing to begin with: give a prompt or a question")
        if self.rules.beams > 1 and not settings.stop_on_eos:
            raise InputError("beam search ends its beams at end-of-sequence tokens: leave stop_on_eos on")
        self.tokens: list[list[int]] = [[] for _ in range(reader.rows)]
        self.reasons: list[str | None] = [None] * reader.rows
        self.prefill_seconds, self.decode_seconds = spent.seconds, 0.0
        self.first_token: float | None = None
        self.read, self.decoded = spent.tokens, 0
        self.peak = 0

    def steps(self) -> Generator[list[list[int]]]:
        """Work; after each step yield the new tokens of every row.

        The tokens of a step go into the cache when the generator goes on, or is closed.
        """
        start = time.perf_counter()
        done = self._prefill(self.blocks[:-1] + self._last_blocks())
        self.prefill_seconds += time.perf_counter() - start
        self.read += self.reader.taken
        if not done or self.interrupt.asked:
            return
        if self.rules.beams > 1:
            yield from self._beams()
        else:
            yield from self._decode()

    def _last_blocks(self) -> list[Block]:
        """The last block; for beams without its last piece, which they must read themselves."""
        if not self.blocks or self.rules.beams == 1:
            return self.blocks[-1:]
        start, _ = cuts(self.blocks[-1].ids.shape[1], self.reader.chunk)[-1]
        return [self.blocks[-1].part(0, start)] if start else []

    def _prefill(self, blocks: list[Block]) -> bool:
        done = True
        with reporting(self.settings.progress, sum(block.ids.shape[1] for block in blocks)) as tell:
            for block in blocks:
                done = done and self.reader.take(block, self.interrupt, tell)
        if self.reader.device.type != "cpu":
            torch.accelerator.synchronize(self.reader.device)
        return done

    def _decode(self) -> Generator[list[list[int]]]:
        reader, rules, rows = self.reader, self.rules, self.reader.rows
        before = self.history.shape[1]
        room = before + self.settings.new_tokens
        # Written in place: a history joined anew for each token would cost more the longer it is.
        history = torch.full((rows, room), reader.pad, device=reader.device)
        history[:, :before] = self.history
        reader.reserve(room - before)
        alive = [True] * rows
        clock = time.perf_counter()
        for column in range(before, room):
            assert reader.transcript.logits is not None
            chosen = rules.choose(history[:, :column], reader.transcript.logits)
            if not all(alive):
                chosen = torch.where(torch.tensor(alive, device=reader.device), chosen, reader.pad)
            history[:, column] = chosen
            tokens: list[int] = chosen.tolist()
            for row in range(rows):
                if alive[row]:
                    self.tokens[row].append(tokens[row])
            over = rules.ended(history[:, : column + 1])
            self.reasons = [self.reasons[r] or (over[r] if alive[r] else None) for r in range(rows)]
            new = [[tokens[r]] if alive[r] else [] for r in range(rows)]
            self.decode_seconds += time.perf_counter() - clock
            if self.first_token is None:
                self.first_token = self.prefill_seconds + self.decode_seconds
            closed = False
            try:
                yield new
            except GeneratorExit:
                closed = True
            if closed and sys.is_finalizing():
                return
            clock = time.perf_counter()
            # Rows that have ended take padding, which no cache keeps; their own last token went in before.
            ids = torch.tensor(tokens)[:, None]
            reader.forward(history[:, column : column + 1], Block(ids, torch.tensor(alive)[:, None]))
            self.decoded += sum(alive)
            self.decode_seconds += time.perf_counter() - clock
            clock = time.perf_counter()
            alive = [reason is None for reason in self.reasons]
            if closed or self.interrupt.asked or not any(alive):
                return

    def _beams(self) -> Generator[list[list[int]]]:
        reader, clock = self.reader, time.perf_counter()
        self.tokens, self.reasons, self.peak = search(
            reader, self.rules, self.history, self.valid, self.interrupt
        )
        self.first_token = self.prefill_seconds + time.perf_counter() - clock
        # The cache itself has seen nothing of this yet: it reads the rest of the prompt, and the answers.
        silent = Interrupt()
        start, stop = cuts(self.blocks[-1].ids.shape[1], reader.chunk)[-1]
        reader.take(self.blocks[-1].part(start, stop), silent, lambda _: None)
        reader.take(Block.of(self.tokens, reader.pad, reader.turn), silent, lambda _: None)
        self.decoded += sum(len(tokens) for tokens in self.tokens)
        self.decode_seconds += time.perf_counter() - clock
        yield self.tokens

    def results(self) -> list[Generation]:
        """What there is, one per row."""
        cache = self.reader.cache
        given = [sum(counts) for counts in zip(*(block.counts for block in self.blocks), strict=True)]
        given = [n + self.spent.tokens for n in given or [0] * self.reader.rows]
        seconds = self.prefill_seconds
        timings = Timings(
            prefill_seconds=seconds,
            decode_seconds=self.decode_seconds,
            prefill_tokens_per_second=self.read / seconds if self.read else None,
            decode_tokens_per_second=self.decoded / self.decode_seconds if self.decoded else None,
            time_to_first_token=self.first_token,
        )
        memory = memory_of(cache, self.peak)
        seen: list[int] = self.reader.counts.tolist()
        return [
            Generation(
                text=decode(self.settings.tokenizer, tokens),
                tokens=list(tokens),
                prompt_tokens=given[row],
                finish_reason=cast(FinishReason, self.reasons[row] or "interrupted"),
                timings=timings,
                memory=memory,
                seen=seen[row],
                held=held_range(cache, row),
                cache=cache,
            )
            for row, tokens in enumerate(self.tokens)
        ]
