"""Rules: how the next token is chosen and when to stop; transformers' own, read from a GenerationConfig."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import (
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from modicum.errors import InputError

_SINGLE = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_BEAMS = (GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)
_ASSISTED = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


@dataclass(frozen=True)
class Rules:
    """What transformers makes of the settings, for one model and one history."""

    processors: LogitsProcessorList
    criteria: list[StoppingCriteria]
    given: StoppingCriteriaList
    """Those of the criteria that the configuration below does not say, for `model.generate`."""
    config: GenerationConfig
    """To be passed on to `model.generate`."""
    sample: bool
    beams: int
    eos: frozenset[int]

    @classmethod
    def read(
        cls,
        model: Any,
        tokenizer: Any,
        ids: Tensor,
        valid: Tensor,
        config: GenerationConfig,
        stop_on_eos: bool,
    ) -> Rules:
        """Let transformers build its logits processors and stopping criteria for a history ids [B, n].

        Raises:
            InputError: settings that transformers refuses, or that a budget cache cannot serve.
        """
        config = copy.deepcopy(config)
        given = StoppingCriteriaList()
        if config.stop_strings:
            # Given as a criterion: a custom loop is handed no tokenizer by transformers.
            given.append(StopStringCriteria(tokenizer, config.stop_strings))
            config.stop_strings = None

        def keep(
            model: Any,
            input_ids: Any,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: Any,
            **_: Any,
        ) -> Any:
            return logits_processor, stopping_criteria, generation_config

        try:
            # The public way to a decoding loop of one's own; this one only takes what it is handed.
            processors, criteria, merged = model.generate(
                ids,
                attention_mask=valid.long(),
                generation_config=config,
                stopping_criteria=StoppingCriteriaList(given),
                custom_generate=keep,
            )
        except ValueError as error:
            raise InputError(f"transformers refuses these generation settings: {error}") from error
        _check(merged)
        eos = merged.eos_token_id
        eos = frozenset(() if eos is None else [eos] if isinstance(eos, int) else eos)
        if not stop_on_eos:
            criteria = [c for c in criteria if not hasattr(c, "eos_token_id")]
        beams = int(merged.num_beams or 1)
        return cls(processors, list(criteria), given, config, bool(merged.do_sample), beams, eos)

    @torch.no_grad()
    def choose(self, history: Tensor, logits: Tensor) -> Tensor:
        """The next token of each row: history [B, n], logits [B, vocabulary] -> [B]."""
        # A copy in fp32: processors write into what they are given.
        scores: Tensor = self.processors(history, logits.to(copy=True, dtype=torch.float32))
        if not self.sample:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)

    def ended(self, history: Tensor) -> list[str | None]:
        """Per row "stop", "length", or None to go on; a stop outweighs a limit reached at the same time."""
        reasons: list[str | None] = [None] * history.shape[0]
        for criterion in self.criteria:
            limit = isinstance(criterion, MaxLengthCriteria | MaxTimeCriteria)
            for row, over in enumerate(criterion(history, None).tolist()):
                if over and reasons[row] != "stop":
                    reasons[row] = "length" if limit else "stop"
        return reasons


def settings(
    model: PreTrainedModel, tokenizer: Any, given: GenerationConfig | None, max_new_tokens: int, pad: int
) -> GenerationConfig:
    """The configuration to go by: the one given, else the model's; what it leaves open is the model's."""
    if given is not None and not isinstance(given, GenerationConfig):
        raise InputError(
            f"generation_config is {type(given).__name__}: give a transformers.GenerationConfig, such as "
            "GenerationConfig(do_sample=True, temperature=0.7)"
        )
    config = copy.deepcopy(model.generation_config if given is None else given)
    config.max_length = None
    config.max_new_tokens = max_new_tokens
    config.return_dict_in_generate = False
    config.use_cache = True  # a checkpoint may say otherwise
    if config.pad_token_id is None:
        config.pad_token_id = pad
    if config.eos_token_id is None and model.generation_config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    for name in _ASSISTED:
        if getattr(config, name, None):
            raise _assisted(name)
    return config


def with_eos(config: GenerationConfig, model: PreTrainedModel, token: int) -> list[int]:
    """The tokens that end an answer by the settings, or else by the model's, and one more."""
    ends = config.eos_token_id
    if ends is None:
        ends = model.generation_config.eos_token_id
    known = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return known if token in known else [*known, token]


def _assisted(name: str) -> InputError:
    return InputError(
        f"generation_config sets {name}: assisted decoding takes tokens back, and what was evicted for them "
        "is gone. Leave it out"
    )


def _check(config: GenerationConfig) -> None:
    for name in _ASSISTED:
        if getattr(config, name, None):
            raise _assisted(name)
    mode = config.get_generation_mode()
    if mode not in _SINGLE + _BEAMS:
        raise InputError(
            f"generation_config asks for {mode.value}: use greedy decoding, sampling or beam search"
        )
    if (config.num_return_sequences or 1) > 1:
        raise InputError(
            f"num_return_sequences is {config.num_return_sequences}: one answer comes for each prompt; give "
            "the prompt several times in a list"
        )
