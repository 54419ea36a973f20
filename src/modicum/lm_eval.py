"""EleutherAI's lm-evaluation-harness: its tasks with the model's cache under a budget.

The harness finds models by name once their class is registered, which importing this module does. It has no
way to import one by itself, so this module is also its command line:

    python -m modicum.lm_eval run --model modicum --tasks TASKS \
        --model_args pretrained=smollm2,policy=auto,budget=12.5%

Answers and likelihoods are those of the harness's own definitions; what differs is the cache: the context is
read in chunks under the budget, then the continuation is scored or generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from modicum.errors import InputError, ModelError
from modicum.generation.generate import stream
from modicum.generation.inputs import Block
from modicum.generation.interrupt import Interrupt
from modicum.generation.likelihood import log_likelihoods
from modicum.generation.reader import Reader
from modicum.kv.cache import BudgetCache
from modicum.loading import load

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows
except ImportError as error:
    raise ModelError(
        f"lm-evaluation-harness is not installed ({error}): pip install 'modicum[lm-eval]'"
    ) from error

_NEW_TOKENS = 256
_POSITIONS = 2048  # of a model whose configuration does not say how many it has


@register_model("modicum")
class BudgetLM(LM):
    """A causal LM whose cache never holds more than its budget.

    Args:
        pretrained: as for `modicum.load`: a folder, "reference", "smollm2", a .gguf file, a name on the Hub.
        policy, budget, store, positions, chunk, n_sink, recent: as for `modicum.BudgetCache`; a budget such
            as "12.5%" is that share of each context.
        dtype, device: as for `modicum.load`.
        max_gen_toks: tokens of an answer where the task does not say.
        batch_size, max_batch_size: taken because the harness gives them; requests run one by one.
    """

    def __init__(
        self,
        pretrained: str = "smollm2",
        policy: str = "auto",
        budget: int | str = 2048,
        store: str = "model",
        positions: str = "original",
        chunk: int = 512,
        n_sink: int = 4,
        recent: int = 32,
        dtype: str = "auto",
        device: str | None = None,
        max_gen_toks: int = _NEW_TOKENS,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        # The harness asks for "cuda:0" unless told otherwise; its own models then take what there is.
        given = device if device and (torch.cuda.is_available() or not device.startswith("cuda")) else "auto"
        self.model, self.tokenizer = load(pretrained, dtype=dtype, device=given)
        self.name = pretrained
        self.settings: dict[str, Any] = {
            "policy": policy,
            "budget": budget if isinstance(budget, int) else str(budget),
            "store": store,
            "positions": positions,
            "chunk": chunk,
            "n_sink": n_sink,
            "recent": recent,
        }
        self.max_gen_toks = max_gen_toks
        config = self.model.config.get_text_config(decoder=True)
        self.max_length = int(getattr(config, "max_position_embeddings", None) or _POSITIONS)

    @property
    def tokenizer_name(self) -> str:
        """What the harness keys its cache of requests with."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source; "" where none is used."""
        return "" if chat_template is False else str(self.tokenizer.chat_template or "")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the tokenizer's template writes it."""
        if not self.tokenizer.chat_template:
            raise InputError(f"{self.name} has no chat template: leave --apply_chat_template out")
        text: str = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log-probability of the continuation in nats, whether greedy decoding gives it) of each request
        (context, continuation). A context that several continuations share is read once.
        """
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        by_context: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for index, request in enumerate(requests):
            context, target = self._encode_pair(*request.args)
            by_context.setdefault(tuple(context), []).append((index, target))
        for shared, targets in by_context.items():
            reader = self._read(list(shared))
            for index, target in targets:
                one = reader if len(targets) == 1 else Reader(self.model, reader.cache.copy(), 1, reader.pad)
                if one is not reader:
                    one.transcript.logits = reader.transcript.logits
                found[index] = _score(one, target)
                self.cache_hook.add_partial("loglikelihood", requests[index].args, found[index])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-probability of each whole text in nats, in windows of the model's positions, each read token
        by token under the budget.
        """
        found = []
        for request in requests:
            ids = self._ids(request.args[0])
            windows = get_rolling_token_windows(ids, self._prefix, self.max_length, 1)
            total = 0.0
            for context, target in windows:
                # The two overlap, but for the first token of the context and the last of the target.
                start = context[: len(context) - len(target) + 1]
                total += _score(self._read(start), target)[0]
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return found

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer to each request (context, settings), cut before the first stop string."""
        answers = []
        for request in requests:
            context, settings = request.args
            answer = self._generate(context, dict(settings))
            answers.append(answer)
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        from transformers import GenerationConfig

        until = settings.pop("until", None) or []
        stops = [until] if isinstance(until, str) else list(until)
        most = int(settings.pop("max_gen_toks", None) or self.max_gen_toks)
        sampled = {key: settings[key] for key in ("temperature", "top_p", "top_k") if key in settings}
        greedy = not settings.get("do_sample", False) or sampled.get("temperature") == 0
        make: Any = GenerationConfig
        config = make(do_sample=False) if greedy else make(do_sample=True, **sampled)
        room = self.max_length - most
        if room < 1:
            raise InputError(f"max_gen_toks is {most}: the model has {self.max_length} positions in all")
        ids = self._ids(context)
        if len(ids) > room:  # as the harness does it: the end of the context counts
            context = self.tokenizer.decode(ids[-room:])
        text = ""
        pieces = stream(
            self.model,
            self.tokenizer,
            context or self.tokenizer.decode([self._prefix]),
            max_new_tokens=most,
            generation_config=config,
            chat=False,
            **self.settings,
        )
        for piece in pieces:
            text += piece
            if any(stop in text for stop in stops):
                break
        for stop in stops:
            text = text.split(stop, 1)[0]
        return text

    @property
    def _prefix(self) -> int:
        """The token before a text without context."""
        first = self.tokenizer.bos_token_id
        first = self.tokenizer.eos_token_id if first is None else first
        if first is None:
            raise InputError(f"{self.name} has neither a BOS nor an EOS token to begin a text with")
        return int(first)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of context and continuation; white space at the context's end goes to the continuation."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        ids = list(self.tokenizer(context)["input_ids"]) if context else []
        whole = list(self.tokenizer(context + continuation)["input_ids"]) if context else []
        target = whole[len(ids) :] if whole[: len(ids)] == ids else self._ids(continuation)
        target = target if context else self._ids(continuation)
        ids = ids or [self._prefix]
        room = self.max_length + 1 - len(target)
        return ids[-max(1, room) :], target

    def _read(self, ids: list[int]) -> Reader:
        cache = BudgetCache(self.model, **self.settings, length=len(ids))
        reader = Reader(self.model, cache, 1, 0)
        reader.take(Block.of([ids], 0), Interrupt(), lambda _: None)
        return reader


def _score(reader: Reader, target: list[int]) -> tuple[float, bool]:
    """Log-probability of the target after what the reader has read, and whether it is greedy throughout."""
    found, best = log_likelihoods(reader, target)
    return float(found.sum()), bool(best.all())


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
