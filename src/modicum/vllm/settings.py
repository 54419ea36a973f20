"""Settings of the plug-in, from vLLM's own `--additional-config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import modicum.kv.policies  # noqa: F401  # registers them
from modicum.errors import InputError, PolicyError
from modicum.kv.budget import Budget
from modicum.kv.policies.calibrated import Calibrated
from modicum.kv.policies.razor import RazorAttention
from modicum.kv.policy import ALL, Policy
from modicum.kv.registry import parse_policy

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEY = "modicum"
_KNOWN = ("policy", "budget", "n_sink", "recent", "evict_every", "chunk")


@dataclass(frozen=True)
class Settings:
    """What each request's cache is held to."""

    policy: Policy
    budget: int
    """Tokens per KV head that a request holds between steps."""
    n_sink: int
    recent: int
    evict_every: int
    chunk: int
    """Most tokens of one request in one step."""

    @property
    def protected(self) -> int:
        """Newest tokens that stay."""
        return max(self.recent, self.policy.window)

    def pages(self, block_size: int) -> int:
        """Pages that a request has at most."""
        return whole_pages(self.budget + self.chunk, block_size)

    @classmethod
    def of(cls, given: Any, chunk: int) -> Settings:
        """From the dictionary under "modicum".

        Raises:
            InputError: a name or a value that is not known.
            PolicyError: a policy that cannot run inside vLLM, with the reason.
            BudgetError: a budget that does not hold sinks and recent tokens.
        """
        if not isinstance(given, dict):
            raise InputError(f'"{KEY}" in --additional-config is {given!r}: it must be an object')
        unknown = sorted(set(given) - set(_KNOWN))
        if unknown:
            raise InputError(f'"{KEY}" has no setting {unknown[0]!r}: choose of {", ".join(_KNOWN)}')
        policy = parse_policy(str(given.get("policy", "keydiff")))
        if (reason := why_not(policy)) is not None:
            raise PolicyError(f"{policy} cannot run inside vLLM: {reason}")
        tokens = given.get("budget", 2048)
        if isinstance(tokens, bool) or not isinstance(tokens, int):
            raise InputError(f"the budget inside vLLM is a number of tokens per KV head, not {tokens!r}")
        names = ("n_sink", "recent", "evict_every")
        budget = Budget(tokens=tokens, chunk=chunk, **{name: given[name] for name in names if name in given})
        budget.check_tokens(tokens, policy.window, "")
        return cls(policy, tokens, budget.n_sink, budget.recent, budget.evict_every, chunk)

    @classmethod
    def of_config(cls, config: VllmConfig) -> Settings | None:
        """What the server was given, checked against its other settings; None if it was given none.

        Raises:
            InputError: a setting of the server with which the bound or the answers would not hold.
        """
        extra = config.additional_config
        if not isinstance(extra, dict) or KEY not in extra:
            return None
        refuse(config)
        return cls.of(extra[KEY], bounded_chunk(extra[KEY], config.scheduler_config))


def whole_pages(tokens: int, block_size: int) -> int:
    """Pages for so many tokens."""
    return -(-tokens // block_size)


def why_not(policy: Policy) -> str | None:
    """Why a policy cannot run inside vLLM; None if it can."""
    if not policy.evicts:
        return "it never evicts; leave modicum out to keep all"
    if isinstance(policy, RazorAttention | Calibrated):
        return "its heads hold unequal numbers of tokens, and vLLM's kernels know one length for all heads"
    if policy.head_shares() is not None:
        return "its heads compete for slots, and vLLM's kernels know one length for all heads"
    if len(set(policy.layer_budgets(64, 4, 1))) > 1:
        return "its layers have unequal budgets, and all layers share a request's pages"
    if policy.needs_rotary:
        return "it reads queries before the rotary embedding, which an attention backend does not see"
    if policy.query_rows == ALL or policy.accumulates:
        return "it adds up numbers of its own for each token, for which vLLM's pages have no room"
    if policy.needs_output_weight:
        return "it reads the output projection, which an attention backend does not see"
    return None


def bounded_chunk(given: Any, scheduler: Any) -> int:
    """Most tokens of one request in one step: the chunk, where the scheduler keeps to it, or all of a step's.

    Raises:
        InputError: the chunk would not be kept, or a step is too short for it.
    """
    step = int(scheduler.max_num_batched_tokens)
    chunk = given.get("chunk", step) if isinstance(given, dict) else step
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise InputError(f"chunk is {chunk!r}: it must be a whole number of at least 1")
    if chunk >= step:
        return step
    named = scheduler.scheduler_cls
    name = named if isinstance(named, str) else getattr(named, "__qualname__", "")
    if name.split(".")[-1] != "ArenaScheduler":
        raise InputError(
            f"a chunk of {chunk} tokens is kept by modicum's scheduler only: give --scheduler-cls "
            f"modicum.vllm.scheduler.ArenaScheduler, or --max-num-batched-tokens {chunk}"
        )
    if step < chunk + scheduler.max_num_seqs:
        raise InputError(
            f"--max-num-batched-tokens {step} leaves no room for a chunk of {chunk} beside "
            f"{scheduler.max_num_seqs} requests that decode: give at least {chunk + scheduler.max_num_seqs}"
        )
    return chunk


def refuse(config: VllmConfig) -> None:
    """Raise where a setting of the server goes against the bound, by the name of the setting."""
    parallel, cache = config.parallel_config, config.cache_config
    reasons = {
        "--enable-prefix-caching": (cache.enable_prefix_caching, "pages are rewritten as tokens go"),
        "--speculative-config": (config.speculative_config is not None, "drafts cannot be taken back"),
        "--kv-transfer-config": (config.kv_transfer_config is not None, "pages are not in token order"),
        "--decode-context-parallel-size": (parallel.decode_context_parallel_size > 1, "pages are split"),
        "--prefill-context-parallel-size": (parallel.prefill_context_parallel_size > 1, "pages are split"),
        "--enable-dbo": (parallel.enable_dbo, "a step is split in two"),
        "--kv-cache-dtype": (cache.cache_dtype not in ("auto", "float32", "bfloat16"), "pages are coded"),
    }
    for name, (given, why) in reasons.items():
        if given:
            raise InputError(f"modicum does not go with {name} ({why}): start the server without it")
