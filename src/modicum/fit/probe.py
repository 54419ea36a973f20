"""Probe: texts and questions on which a changed model is compared with the model as it was.

What is compared is what comes after a text that was read: running text, and the model's own answers to
questions that were hidden while the text was read. The error is the Kullback-Leibler divergence
KL(reference ‖ changed) of the next token, in nats. Puzzle (arXiv 2411.19146) finds it the best score of a
replaced block; that answers count beside running text is ours: running text hardly needs what a cache evicts.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from modicum.compat import cache_argument
from modicum.errors import InputError
from modicum.evaluation.runner import Prompt, max_positions
from modicum.fit.haystack_questions import in_haystack
from modicum.kv.cache import BudgetCache
from modicum.kv.call import cuts
from modicum.tasks.expression import parse_task

TAIL = 256
"""Tokens of running text that are predicted, or half of a shorter text."""
CHUNK = 512
_SEED = 2_000_003
"""Added to the seed of questions, so that an evaluation with a small seed asks others."""
MakeCache = Callable[[int], BudgetCache]
"""A new cache for a text of so many tokens."""


@dataclass(frozen=True)
class Errors:
    """How far a changed model is from the reference, summed over its probes.

    Attributes:
        text: mean KL of the next token in running text, nats.
        answers: the same over the tokens of the reference's answers; 0 if nothing is asked.
        kept: the share of questions whose whole answer stays the likeliest.
        nsr: noise-to-signal ratio of a replaced block's output; NaN where no single block was replaced.
    """

    text: float
    answers: float
    kept: float
    nsr: float = float("nan")

    def loss(self, task_share: float) -> float:
        """The weighted mean of the two errors."""
        return (1 - task_share) * self.text + task_share * self.answers

    @property
    def is_finite(self) -> bool:
        """Whether both errors are finite numbers."""
        return math.isfinite(self.text) and math.isfinite(self.answers)

    def to_dict(self) -> dict[str, float]:
        """As JSON takes it."""
        return {k: v for k, v in asdict(self).items() if v == v}


@dataclass
class Tail:
    """What comes after a text.

    Attributes:
        ids: [n] int64, question and answer, or running text.
        start: the first of them that is predicted; at least 1.
        log_probs: [n - start, V], the reference's, in 16 bits.
    """

    ids: Tensor
    start: int
    log_probs: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass
class Probe:
    """A text that is read, and what comes after it."""

    context: Tensor
    """[N] int64."""
    tails: list[Tail]
    asks: bool
    """Whether the tails are questions."""


class Probes:
    """All probes of a reference, with its log-probabilities.

    Args:
        model: the reference; it is called now, and may be changed afterwards.
        ids: [n, N] windows of running text.
        tasks: as `modicum.tasks.parse_task` reads them; "" for none.
        text: file or folder that the questions' needles are put into; None for the sample text.
        progress: called with probes that are done, and in all.

    Raises:
        InputError: a task is not known, asks nothing, or takes more tokens than there are.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        ids: Tensor,
        tasks: str,
        text: Path | None,
        seed: int = 0,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        num, length = ids.shape
        tail = min(TAIL, length // 2)
        # The tail begins with one token that is not predicted: what reads the text gives no logits.
        self.items = [Probe(row[: -tail - 1], [Tail(row[-tail - 1 :], 1)], False) for row in ids]
        self.items += _asked(model, tokenizer, tasks, num, length, text, seed) if tasks else []
        tell = progress or (lambda *_: None)
        tell(0, len(self.items))
        for number, item in enumerate(self.items):
            _answer(model, tokenizer, item)
            for tail_, logits in zip(item.tails, _logits(model, item, None), strict=True):
                tail_.log_probs = logits.to(torch.float16)
            tell(number + 1, len(self.items))

    @property
    def read(self) -> int:
        """The fewest tokens of a text that is read before its tail."""
        return min(len(item.context) for item in self.items)

    @property
    def digest(self) -> str:
        """16 hex digits that stand for all tokens, answers included."""
        found = hashlib.sha256()
        for item in self.items:
            for ids in (item.context, *(tail.ids for tail in item.tails)):
                found.update(ids.numpy().tobytes() + b"|")
        return found.hexdigest()[:16]

    def read_all(self, model: PreTrainedModel) -> None:
        """Call a model as `measure` does, with its own cache; predictions are not looked at."""
        for item in self.items:
            _logits(model, item, None)

    def is_reference(self, model: PreTrainedModel) -> bool:
        """Whether a model predicts the first probe as the reference did, to the last bit that is kept."""
        item = self.items[0]
        return all(
            torch.equal(tail.log_probs, logits.to(tail.log_probs.dtype))
            for tail, logits in zip(item.tails, _logits(model, item, None), strict=True)
        )

    def measure(self, model: PreTrainedModel, make_cache: MakeCache | None = None) -> Errors:
        """The errors of a changed model, of another cache than the whole one, or of both."""
        sums = {True: [0.0, 0], False: [0.0, 0]}
        kept, asked = 0, 0
        for item in self.items:
            for tail, log_probs in zip(item.tails, _logits(model, item, make_cache), strict=True):
                reference = tail.log_probs.float()
                divergence = (reference.exp() * (reference - log_probs)).sum(-1)
                sums[item.asks][0] += float(divergence.sum())
                sums[item.asks][1] += len(divergence)
                if item.asks:
                    asked += 1
                    goal = tail.ids[tail.start :]
                    kept += bool((log_probs.argmax(-1).cpu() == goal).all())
        mean = {asks: total / count if count else 0.0 for asks, (total, count) in sums.items()}
        return Errors(mean[False], mean[True], kept / asked if asked else 1.0)


def _asked(
    model: PreTrainedModel, tokenizer: Any, tasks: str, num: int, length: int, text: Path | None, seed: int
) -> list[Probe]:
    """`num` texts for each task that asks, with their questions; the answers are not there yet."""
    kinds = parse_task(tasks)
    found: list[Probe] = []
    for number in range(num):
        kind: Any = kinds[number % len(kinds)]
        if kind.metric == "loss":
            raise InputError(
                f"{kind.name} asks no questions: give a task with answers, such as niah_single_2"
            )
        kind = in_haystack(kind, text)
        questions = int(getattr(kind, "questions", 1))
        first = number // len(kinds) * questions
        samples = [kind.sample(first + i, length, tokenizer, seed + _SEED) for i in range(questions)]
        prompts = [Prompt.of(sample, model, tokenizer) for sample in samples]
        tails = [Tail(torch.tensor(prompt.question), samples[0].max_new_tokens) for prompt in prompts]
        found.append(Probe(torch.tensor(prompts[0].context), tails, True))
    return found


@torch.no_grad()
def _answer(model: PreTrainedModel, tokenizer: Any, item: Probe) -> None:
    """Append the model's greedy answers to the questions, up to the end of a line."""
    if not item.asks:
        return
    cache = _whole(model, item)
    run: Any = model
    ends = run.generation_config.eos_token_id if run.generation_config else None
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    for tail in item.tails:
        most, own = tail.start, copy.deepcopy(cache)
        ids = tail.ids[None]
        answer: list[int] = []
        while len(answer) < most:
            answer.append(int(_call(model, ids, own, logits_to_keep=1)[0, -1].argmax()))
            if answer[-1] in ends or "\n" in tokenizer.decode(answer).lstrip():
                break
            ids = torch.tensor([[answer[-1]]])
        tail.start, tail.ids = len(tail.ids), torch.cat([tail.ids, torch.tensor(answer)])


@torch.no_grad()
def _whole(model: PreTrainedModel, item: Probe, cache: Any = None) -> Any:
    """A cache that has read the text."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    for start, stop in cuts(len(item.context), CHUNK):
        _call(model, item.context[None, start:stop], cache, logits_to_keep=1)
    return cache


def _call(model: Any, ids: Tensor, cache: Any, **more: Any) -> Tensor:
    """Logits [1, n, V] of tokens that go on with a cache."""
    logits: Tensor = model(ids.to(model.device), **{cache_argument(model): cache}, **more).logits
    return logits


@torch.no_grad()
def _logits(model: PreTrainedModel, item: Probe, make_cache: MakeCache | None) -> list[Tensor]:
    """Log-probabilities [n - start, V] float32 of each tail."""
    cache = _whole(model, item, None if make_cache is None else make_cache(len(item.context)))
    found = []
    for tail in item.tails:
        own = copy.deepcopy(cache) if len(item.tails) > 1 else cache
        logits = _call(model, tail.ids[None, :-1], own)[0, tail.start - 1 :]
        found.append(logits.float().log_softmax(-1).cpu())
    return found


def probe_length(model: PreTrainedModel, wanted: int, context: int) -> int:
    """Tokens of a probe: what is wanted, within the context and the model's positions."""
    return min(x for x in (wanted, context, max_positions(model)) if x)


def windows(ids: Sequence[int], num: int, length: int) -> Tensor:
    """[num, length] windows, evenly spaced over the text.

    Raises:
        InputError: the text is shorter than one of them.
    """
    if len(ids) < length:
        raise InputError(
            f"the text has {len(ids):,} tokens, and errors are measured on stretches of {length:,}: give "
            "more text, or a shorter probe_length"
        )
    most = len(ids) - length
    return torch.tensor([ids[(s := most * i // max(1, num - 1)) : s + length] for i in range(num)])
