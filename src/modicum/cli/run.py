"""`modicum run`: answer a prompt of any length under a budget."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli.console import load, print_json, print_table, read_text
from modicum.cli.options import (
    ChunkOption,
    CompileOption,
    DeviceOption,
    DtypeOption,
    EvictEveryOption,
    FileOption,
    JsonOption,
    ModelOption,
    PositionsOption,
    RecentOption,
    RunBudgetOption,
    RunPolicyOption,
    RunStoreOption,
    SampleOption,
    SinkOption,
    cache_defaults,
    cache_settings,
)
from modicum.errors import InputError

if TYPE_CHECKING:
    from modicum.generation.generate import Generation
    from modicum.kv.budget import Budget
    from modicum.kv.policy import Policy


def run(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; with a file (or --sample), a question about it.")
    ] = None,
    prompt_file: FileOption = None,
    sample: SampleOption = False,
    question: Annotated[
        list[str] | None,
        typer.Option(
            "--question", "-q", help="Ask this of the compressed prompt; may be given several times."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help='Make text and question by a task, such as "niah_single_2".', metavar="TASK"),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of the task's text, question and answer.")] = 1024,
    model: ModelOption = "reference",
    policy: RunPolicyOption = None,
    budget: RunBudgetOption = None,
    chunk: ChunkOption = 512,
    n_sink: SinkOption = 4,
    recent: RecentOption = 32,
    evict_every: EvictEveryOption = 1,
    positions: PositionsOption = "original",
    store: RunStoreOption = None,
    compile: CompileOption = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Longest answer.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="Sample at this temperature; 0 is greedy.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Sample from this share of probability.")
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Sample from so many tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    beside_full: Annotated[
        bool, typer.Option("--beside-full", help="Answer with the full cache too, and show both.")
    ] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Read the text as it is, without the model's chat template.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt of any length; then say what it took.

    The prompt is an argument, a file, stdin, or the first sample of a task, whose right answer is shown too.
    A model with a chat template reads it as the user's turn, and a question in the same turn, once the prompt
    has been compressed. Ctrl-C stops the answer and shows what there is.
    """
    questions = list(question or [])
    if task is None:
        text, expected = _context(prompt, prompt_file, sample, questions), None
    elif prompt is not None or prompt_file is not None or sample or questions:
        raise InputError("--task makes the prompt and its question: leave the others out")
    own = cache_defaults(model)
    budget = str(own.budget) if budget is None else budget
    store = own.store if store is None else store
    policy_or_own = own.policy if policy is None else policy
    settings = cache_settings(
        policy_or_own, budget, chunk, n_sink, recent, evict_every, positions, store, compile
    )
    lm, tokenizer = load(model, dtype, device)
    if task is not None:
        text, asked_by_task, expected = _task_sample(task, length, tokenizer, raw)
        questions = [asked_by_task] if asked_by_task else []
    import torch

    if seed is not None:
        torch.manual_seed(seed)
    common: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "generation_config": _sampling(temperature, top_p, top_k),
        "chat": False if raw else None,
    }
    head = {"model": model, "policy": str(settings["policy"]), "budget": budget}
    if len(questions) <= 1:
        asked = questions[0] if questions else None
        answer = _answer(
            lm, tokenizer, text, as_json, question=asked, progress=not as_json, **settings, **common
        )
        answers = [answer]
        shown: dict[str, Any] = {**head, **answer.to_dict()}
    else:
        answers, read = _interview(lm, tokenizer, text, questions, as_json, settings, common)
        asked_and_told = [{"question": q, **a.to_dict()} for q, a in zip(questions, answers, strict=False)]
        shown = {**head, "context": read, "answers": asked_and_told}
    whole: list[Generation] = []
    if beside_full and not any(answer.finish_reason == "interrupted" for answer in answers):
        longest = max(answer.seen - len(answer.tokens) for answer in answers) + max_new_tokens
        full = {"policy": "full", "budget": _everything(settings["budget"], longest)}
        whole = _with_full_cache(lm, tokenizer, text, questions, as_json, full, common)
        shown["full"] = [answer.to_dict() for answer in whole]
    if expected is not None:
        shown["expected"] = expected
    if as_json:
        print_json(shown)
    else:
        if expected is not None:
            print(f"\nExpected: {', '.join(expected)}", flush=True)
        _report(answers, {**head, "policy": _settled(settings["policy"], answers)})
        if _wants_calibration(settings["policy"], answers):
            print(f"every KV head had as many slots; to give each what it needs: modicum calibrate {model}")
        if whole:
            _report(whole, {**head, "policy": "full", "budget": "everything"})
    if any(answer.finish_reason == "interrupted" for answer in [*answers, *whole]):
        raise typer.Exit(130)


def _settled(policy: str | Policy, answers: list[Generation]) -> str:
    """The policy that was used: what was asked for may depend on what is known of the model."""
    cache = answers[0].cache if answers else None
    return str(policy if cache is None else cache.policy)


def _wants_calibration(policy: str | Policy, answers: list[Generation]) -> bool:
    """Whether tokens were evicted, by what stands in where the model has no calibration."""
    from modicum.kv.policies.calibrated import Calibrated
    from modicum.kv.registry import parse_policy

    cache = answers[0].cache if answers else None
    asked = parse_policy(policy)
    if cache is None or not isinstance(asked, Calibrated):
        return False
    return cache.seen > cache.plan.tokens and not isinstance(cache.policy, Calibrated)


def _context(prompt: str | None, path: Path | None, sample: bool, questions: list[str]) -> str:
    """The text to read; a prompt beside a file becomes the first question."""
    if path is not None and sample:
        raise InputError("--prompt-file and --sample both give a prompt: leave one out")
    if path is None and not sample:
        if prompt is None and not sys.stdin.isatty():
            return read_text(Path("-"))
        if prompt is None:
            raise InputError("there is no prompt: give one as an argument, by --prompt-file, or pipe it in")
        if not prompt.strip():
            raise InputError("the prompt is empty: give some text")
        return prompt
    if prompt is not None:
        questions.insert(0, prompt)
    if path is not None:
        return read_text(path)
    from modicum.texts import sample_text

    return sample_text()


def _task_sample(expression: str, length: int, tokenizer: Any, raw: bool) -> tuple[str, str, list[str]]:
    """The context, the question and the right answers of a task's first sample."""
    from modicum.generation.chat import has_template
    from modicum.tasks import parse_task

    sample = parse_task(expression)[0].sample(0, length, tokenizer)
    question = sample.asked if not raw and has_template(tokenizer) else sample.question
    return sample.context, question, list(sample.answers)


def _sampling(temperature: float | None, top_p: float | None, top_k: int | None) -> Any:
    """A GenerationConfig for what was asked, or None for the model's own."""
    if temperature is None and top_p is None and top_k is None:
        return None
    for name, value, least, most in (
        ("temperature", temperature, 0, None),
        ("top-p", top_p, 0, 1),
        ("top-k", top_k, 1, None),
    ):
        if value is not None and (value < least or (most is not None and value > most)):
            limit = f"at least {least}" if most is None else f"from {least} to {most}"
            raise InputError(f"--{name} is {value}: it must be {limit}")
    import transformers

    config: Any = transformers.GenerationConfig  # has no types
    if temperature == 0:
        return config(do_sample=False)
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    return config(do_sample=True, **{k: v for k, v in given.items() if v is not None})


def _answer(lm: Any, tokenizer: Any, text: str | None, silent: bool, **settings: Any) -> Generation:
    """Answer once, text to stdout as it comes unless silent."""
    from modicum.generation.generate import stream

    pieces = stream(lm, tokenizer, text, **settings)
    # A stream ends by itself if Ctrl-C comes while it works; here it may come while we print.
    with suppress(KeyboardInterrupt):
        for piece in pieces:
            if not silent:
                print(piece, end="", flush=True)
    if not silent:
        print(flush=True)
    return pieces.result


def _interview(
    lm: Any,
    tokenizer: Any,
    text: str,
    questions: list[str],
    silent: bool,
    settings: dict[str, Any],
    common: dict[str, Any],
) -> tuple[list[Generation], dict[str, float]]:
    """Several questions: the prompt is compressed once, each question goes to a copy."""
    from modicum.generation.generate import prefill

    start = time.perf_counter()
    cache = prefill(lm, tokenizer, text, progress=not silent, chat=common["chat"], **settings)
    read = {"tokens": cache.seen, "prefill_seconds": time.perf_counter() - start}
    answers: list[Generation] = []
    for question in questions:
        if not silent:
            print(f"{'' if not answers else chr(10)}> {question}", flush=True)
        answers.append(_answer(lm, tokenizer, None, silent, question=question, cache=cache.copy(), **common))
        if answers[-1].finish_reason == "interrupted":
            break
    return answers, read


def _everything(budget: Budget, tokens: int) -> Budget:
    """A budget that so many tokens fit into."""
    return replace(budget, tokens=max(tokens + 1, budget.least(0)), nbytes=None, share=None)


def _with_full_cache(
    lm: Any,
    tokenizer: Any,
    text: str,
    questions: list[str],
    silent: bool,
    settings: dict[str, Any],
    common: dict[str, Any],
) -> list[Generation]:
    """The same answers by a cache that holds everything."""
    if not silent:
        print("\nWith the full cache:", flush=True)
    if len(questions) <= 1:
        asked = questions[0] if questions else None
        return [
            _answer(lm, tokenizer, text, silent, question=asked, progress=not silent, **settings, **common)
        ]
    return _interview(lm, tokenizer, text, questions, silent, settings, common)[0]


def _report(answers: list[Generation], head: dict[str, str]) -> None:
    from modicum.kv.budget import format_size

    def rate(tokens_per_second: float | None, seconds: float) -> str:
        return "–" if tokens_per_second is None else f"{tokens_per_second:,.0f} tokens/s ({seconds:.2f} s)"

    def column(a: Generation) -> list[str]:
        low, high = a.held
        t, m = a.timings, a.memory
        return [
            f"{a.seen:,}",
            f"{low:,}" if low == high else f"{low:,} to {high:,}",
            format_size(m.nbytes),
            f"{format_size(m.full_nbytes)} ({m.nbytes / m.full_nbytes:.1%} of it held)"
            if m.full_nbytes
            else "–",
            format_size(m.peak_nbytes),
            rate(t.prefill_tokens_per_second, t.prefill_seconds),
            rate(t.decode_tokens_per_second, t.decode_seconds),
            f"{len(a.tokens):,} tokens, {a.finish_reason}",
        ]

    names = [
        "tokens seen",
        "held per KV head",
        "bytes held",
        "a full cache",
        "peak",
        "prefill",
        "decode",
        "answer",
    ]
    several = len(answers) > 1
    titles = ["", *(f"question {i + 1}" if several else "" for i in range(len(answers)))]
    rows = [list(row) for row in zip(names, *map(column, answers), strict=True)]
    print_table(titles, rows, title=f"{head['model']}, {head['policy']}, budget {head['budget']}")
