"""The command line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import modicum
from modicum.cli import app
from modicum.generation.generate import generate
from modicum.kv.heads import HeadScores
from modicum.loading import load
from modicum.tasks import parse_task
from tests.bounds import exactly
from tests.tiny_model import TINY_MODEL

PROMPT = "Once upon a time, a girl named Mira sold fresh bread in the old harbour. She had a small dog."
TIGHT = ["--budget", "64", "--chunk", "16", "--recent", "8"]
SETTINGS: dict[str, Any] = {"budget": 64, "chunk": 16, "recent": 8}


def on_tiny(arguments: tuple[str, ...]) -> list[str]:
    """The quick model, where a command loads one and none is named."""
    command, *rest = arguments
    if command in ("run", "keep", "heads") and "--model" not in rest:
        rest = ["--model", str(TINY_MODEL), *rest]
    return [command, *rest]


def call(*arguments: str, text: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, on_tiny(arguments), input=text)


def answered(*arguments: str, text: str | bytes | None = None) -> Any:
    """What --json prints: one JSON value and nothing else on stdout."""
    result = call(*arguments, "--json", text=text)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return load(TINY_MODEL)


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(PROMPT, encoding="utf-8")
    return path


# -- run --


def test_run_prints_the_answer_and_what_it_took(tiny: Any) -> None:
    answer = generate(*tiny, PROMPT, max_new_tokens=20, **SETTINGS)
    result = call("run", PROMPT, *TIGHT, "-n", "20")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(answer.text + "\n")
    table = result.stdout[len(answer.text) :]
    for shown in (
        "tokens seen",
        f"{answer.seen}",
        "bytes held",
        "a full cache",
        "peak",
        "prefill",
        "decode",
        "tokens/s",
    ):
        assert shown in table
    assert result.stderr == ""


def test_run_takes_its_prompt_from_an_argument_a_file_or_stdin(tiny: Any, book: Path) -> None:
    expected = generate(*tiny, PROMPT, max_new_tokens=10, **SETTINGS).tokens
    more = [*TIGHT, "-n", "10"]
    assert answered("run", PROMPT, *more)["tokens"] == expected
    assert answered("run", "--prompt-file", str(book), *more)["tokens"] == expected
    assert answered("run", *more, text=PROMPT)["tokens"] == expected
    assert answered("run", "-f", "-", *more, text="\ufeff" + PROMPT)["tokens"] == expected


def test_run_json_is_the_generation_with_its_settings(tiny: Any) -> None:
    told = answered("run", PROMPT, *TIGHT, "-n", "10", "--policy", "caote+snapkv(window=8)")
    assert (told["model"], told["policy"], told["budget"]) == (
        str(TINY_MODEL),
        "caote(snapkv(window=8))",
        "64",
    )
    expected = generate(
        *tiny, PROMPT, max_new_tokens=10, policy="caote+snapkv(window=8)", **SETTINGS
    ).to_dict()
    for key in ("text", "tokens", "prompt_tokens", "finish_reason", "seen", "held"):
        assert told[key] == expected[key]
    assert told["memory"]["budget_nbytes"] == expected["memory"]["budget_nbytes"]


def test_a_prompt_beside_a_file_is_a_question(tiny: Any, book: Path) -> None:
    expected = generate(*tiny, PROMPT, question=" Then Tom", max_new_tokens=10, **SETTINGS)
    for arguments in ([" Then Tom"], ["--question", " Then Tom"]):
        told = answered("run", "-f", str(book), *arguments, *TIGHT, "-n", "10")
        assert (told["tokens"], told["prompt_tokens"]) == (expected.tokens, expected.prompt_tokens)


def test_make_run_shows_a_right_answer_beside_the_full_caches() -> None:
    """The repository's first command, as the Makefile has it: policy auto finds the needle in 256 slots."""
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    [line] = re.findall(r"^run: venv\n\t\$\(VENV\)/bin/modicum (.+)$", makefile, re.MULTILINE)
    assert "--policy auto --budget 256" in line
    told = answered(*line.split(), "--model", "reference")
    [expected] = told["expected"]
    assert re.fullmatch(r"\d{7}", expected)
    [full] = told["full"]
    assert expected in told["text"]
    assert expected in full["text"]
    assert told["seen"] > 1900
    assert told["memory"]["nbytes"] < told["memory"]["full_nbytes"] / 5


def test_a_task_makes_text_and_question(tiny: Any) -> None:
    arguments = ["run", "--task", "niah_single_1:max_new_tokens=20", "--length", "400", *TIGHT, "-n", "8"]
    told = answered(*arguments)
    [task] = parse_task("niah_single_1:max_new_tokens=20")
    sample = task.sample(0, 400, tiny[1])
    expected = generate(*tiny, sample.context, question=sample.question, max_new_tokens=8, **SETTINGS)
    assert (told["tokens"], told["expected"]) == (expected.tokens, list(sample.answers))
    assert f"Expected: {sample.answers[0]}\n" in call(*arguments).stdout


def test_several_questions_are_each_asked_of_the_compressed_prompt(tiny: Any, book: Path) -> None:
    questions = [" Then Tom", " She saw"]
    expected = generate(*tiny, PROMPT, question=questions, max_new_tokens=10, **SETTINGS)
    arguments = ["-f", str(book), "-q", questions[0], "-q", questions[1], *TIGHT, "-n", "10"]
    told = answered("run", *arguments)
    assert told["context"]["tokens"] == len(tiny[1](PROMPT)["input_ids"])
    assert [answer["question"] for answer in told["answers"]] == questions
    assert [answer["tokens"] for answer in told["answers"]] == [answer.tokens for answer in expected]
    shown = call("run", *arguments).stdout
    for question, answer in zip(questions, expected, strict=True):
        assert f"> {question}\n{answer.text}\n" in shown


def test_the_full_caches_answer_stands_beside(tiny: Any, book: Path) -> None:
    arguments = ["-f", str(book), "-q", " Then Tom", "-q", " She", *TIGHT, "-n", "8", "--beside-full"]
    told = answered("run", *arguments)
    model, tokenizer = tiny
    for question, whole in zip((" Then Tom", " She"), told["full"], strict=True):
        ids = tokenizer(PROMPT)["input_ids"] + tokenizer(question, add_special_tokens=False)["input_ids"]
        inputs = torch.tensor([ids])
        output = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=8, do_sample=False
        )
        assert whole["tokens"] == output[0, len(ids) :].tolist()
        assert whole["held"]["min"] >= len(ids)
    shown = call("run", *arguments).stdout
    assert "With the full cache:" in shown
    assert "budget everything" in shown


def test_a_share_of_the_text_beside_the_full_cache(tiny: Any, book: Path) -> None:
    arguments = ["-f", str(book), "-q", " Then Tom", "--recent", "8", "--budget", "50%", "-n", "4"]
    told = answered("run", *arguments, "--beside-full")
    text = len(tiny[1](PROMPT, add_special_tokens=False)["input_ids"])
    assert told["held"]["max"] <= max(text // 2, 4 + 8)
    assert told["full"][0]["held"]["min"] > text


def test_sampling_follows_temperature_and_seed() -> None:
    def tokens(*more: str) -> list[int]:
        told: list[int] = answered("run", PROMPT, "-n", "15", *more)["tokens"]
        return told

    greedy = tokens()
    assert tokens("--temperature", "0") == greedy
    first = tokens("--temperature", "1.5", "--seed", "1")
    assert tokens("--temperature", "1.5", "--seed", "1") == first
    assert tokens("--temperature", "1.5", "--seed", "2") != first
    assert tokens("--temperature", "1.5", "--top-k", "1", "--seed", "2") == greedy
    assert tokens("--top-p", "0.0001", "--seed", "3") == greedy


def test_a_size_is_a_budget_for_the_whole_cache() -> None:
    told = answered("run", PROMPT, "--budget", "100KiB", "-n", "5", "--recent", "8", "--chunk", "16")
    assert told["memory"]["nbytes"] <= told["memory"]["budget_nbytes"] <= 100 * 1024


def test_the_sample_runs_far_beyond_the_budget_and_says_so(tiny: Any) -> None:
    result = call("run", "--sample", "--budget", "128", "-n", "5", "--json")
    told = json.loads(result.stdout)
    assert told["seen"] > told["prompt_tokens"] == len(tiny[1](modicum.sample_text())["input_ids"]) > 40_000
    assert told["held"] == {"min": 128, "max": 128}
    assert told["memory"]["full_nbytes"] > 100 * told["memory"]["nbytes"]
    assert re.match(r"warning: prompt and answer reach position \d{5},? ", result.stderr)
    assert result.stderr.count("\n") == 1


# -- policies, heads, keep --


def test_policies_lists_every_one_with_its_paper() -> None:
    told = answered("policies")
    assert [entry["name"] for entry in told] == [info.name for info in modicum.policies()]
    razor = next(entry for entry in told if entry["name"] == "razor")
    assert razor["paper"].endswith("2407.15891")
    assert razor["settings"]["induction"] == 0.14
    keydiff = next(entry for entry in told if entry["name"] == "keydiff")
    assert keydiff["also"] == {"manifoldkv": "keydiff(metric='l2')"}
    shown = call("policies").stdout
    for info in modicum.policies():
        assert info.name in shown
        assert all(name in shown for name in info.also)


def test_heads_shows_scores_and_razor_uses_what_it_saved(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    result = call("heads", "--out", str(path), "--seeds", "1", "--tokens", "60", "--top", "7")
    assert result.exit_code == 0, result.output
    assert "3 of 20 KV heads retrieve" in result.stdout
    assert result.stdout.count(" yes ") == 3
    assert str(path) in result.stderr
    scores = HeadScores.load(path)
    assert (scores.tokens, scores.seeds, len(scores.echo)) == (60, (0,), 5)
    policy = f'razor(heads="{path}")'
    told = answered("run", PROMPT, "--budget", "80", "--policy", policy, "--recent", "8", "-n", "60")
    assert told["held"]["min"] < told["held"]["max"]


def test_heads_json_is_a_file_of_scores(tmp_path: Path) -> None:
    result = call("heads", "--json", "--seeds", "1", "--tokens", "60")
    path = tmp_path / "scores.json"
    path.write_text(result.stdout, encoding="utf-8")
    assert HeadScores.load(path).seeds == (0,)


@pytest.mark.parametrize("policy", ["keydiff", "adakv+snapkv(window=8)", "razor"])
def test_keep_draws_what_the_cache_holds(tiny: Any, book: Path, tmp_path: Path, policy: str) -> None:
    book.write_text(PROMPT * 4, encoding="utf-8")
    out = tmp_path / "kept.png"
    told = answered("keep", "-f", str(book), "-o", str(out), "-p", policy, "-b", "64", "--recent", "8")
    cache = modicum.prefill(*tiny, PROMPT * 4, policy=policy, budget=64, recent=8)
    assert told["held"] == [layer[0].tolist() for layer in cache.held]
    assert told["seen"] == cache.seen
    held = [n for layer in told["held"] for n in layer]
    assert told["kept_share"] == exactly(sum(held) / len(held) / cache.seen)
    assert out.read_bytes().startswith(b"\x89PNG")
    result = call(
        "keep", "-f", str(book), "-o", str(tmp_path / "kept.svg"), "-p", policy, "-b", "64", "--recent", "8"
    )
    assert result.stdout.startswith(f"{tmp_path}/kept.svg: ")
    assert "%" in result.stdout


@pytest.mark.parametrize("length", [30, 2000])
def test_the_picture_counts_every_position_kept(tiny: Any, length: int) -> None:
    from modicum.cli.keep import kept_shares

    cache = modicum.prefill(*tiny, "a " * length, budget=64, recent=8)
    for layer in range(5):
        shares = kept_shares(cache, layer)
        width = min(720, cache.seen)
        assert shares.shape == (4, width)
        of_column = [sum(p * width // cache.seen == c for p in range(cache.seen)) for c in range(width)]
        assert (shares * of_column).sum(1).round().tolist() == cache.held[layer][0].tolist()


@pytest.mark.parametrize("layers", [5, 13, 80])
def test_pictures_of_deep_models_have_a_panel_for_each_layer(tiny: Any, layers: int) -> None:
    from modicum.cli.keep import draw

    cache = modicum.prefill(*tiny, PROMPT, budget=64, recent=8)
    cache.layers = [cache.layers[i % 5] for i in range(layers)]
    figure = draw(cache, "deep")
    panels = [axes for axes in figure.axes if axes.images]
    assert sorted(int(panel.get_ylabel()) for panel in panels) == list(range(layers))
    assert max(figure.get_size_inches()) < 40


# -- what is around it --


def test_version_and_help() -> None:
    assert call("--version").stdout == f"modicum {modicum.__version__}\n"
    for arguments in (["--help"], ["run", "--help"], ["keep", "-h"]):
        result = call(*arguments)
        assert result.exit_code == 0
        assert "Usage" in result.stdout


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "modicum"] if code is None else [sys.executable, "-c", code]
    return subprocess.run([*start, *arguments], capture_output=True, text=True, timeout=120)


def test_help_waits_for_neither_torch_nor_transformers() -> None:
    code = (
        "import modicum.cli, sys; sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    assert run(code=code).returncode == 0


BAD: list[tuple[list[str], str]] = [
    (["run", ""], "prompt is empty"),
    (["run", "   "], "prompt is empty"),
    (["run"], "stdin is empty"),
    (["run", "--prompt-file", "missing.txt"], "No such file"),
    (["run", "--prompt-file", "."], "Is a directory"),
    (["run", "--prompt-file", "latin.txt"], "not UTF-8 (byte 3)"),
    (["run", "--prompt-file", "empty.txt"], "empty.txt is empty"),
    (["run", "--prompt-file", "good.txt", "--sample"], "leave one out"),
    (["run", "Hi", "--question", ""], "question is empty"),
    (["run", "Hi", "--task", "vt"], "leave the others out"),
    (["run", "--sample", "--task", "vt"], "leave the others out"),
    (["run", "--task", "niah_singel_2"], "did you mean niah_single_2"),
    (["run", "--task", "niah_single_2", "--length", "20"], "niah_single_2 takes at least"),
    (["run", "Hi", "--budget", "0"], "budget"),
    (["run", "Hi", "--budget", "-5"], "budget"),
    (["run", "Hi", "--budget", "many"], "budget"),
    (["run", "Hi", "--budget", "20"], "too small"),
    (["run", "Hi", "--budget", "1KiB"], "at least"),
    (["run", "Hi", "--chunk", "0"], "chunk"),
    (["run", "Hi", "--policy", "keydif"], "did you mean keydiff"),
    (["run", "Hi", "--policy", "caote"], "base"),
    (["run", "Hi", "--policy", "razor(heads='missing.json')"], "missing.json"),
    (["run", "Hi", "--model", "referense"], "did you mean 'reference'"),
    (["run", "Hi", "--model", "./missing"], "no folder"),
    (["run", "Hi", "--dtype", "int8"], "int8"),
    (["run", "Hi", "--device", "nowhere"], "nowhere"),
    (["run", "Hi", "-n", "0"], "max_new_tokens is 0"),
    (["run", "Hi", "--temperature", "-1"], "at least 0"),
    (["run", "Hi", "--top-k", "0"], "at least 1"),
    (["run", "Hi", "--top-p", "2"], "from 0 to 1"),
    (["run", "Hi", "--positions", "new"], "choose one of original, renumbered"),
    (["run", "Hi", "--store", "int3"], "choose one of model, int8, fp8, k8v4, int4"),
    (["heads", "--copies", "1"], "copies"),
    (["heads", "--out", "missing/scores.json"], "no folder missing"),
    (["keep"], "give one prompt"),
    (["keep", "Hi", "--sample"], "give one prompt"),
    (["keep", ""], "prompt is empty"),
    (["keep", "Hi", "--out", "missing/kept.png"], "no folder missing"),
    (["keep", "Hi", "--out", "kept.docx"], "docx"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes(b"caf\xe9 au lait")
    Path("empty.txt").write_text(" \n")
    Path("good.txt").write_text("Hi")
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_unknown_options_are_usage_errors() -> None:
    result = call("run", "Hi", "--budgt", "5")
    assert result.exit_code == 2
    assert "--budget" in result.stderr


def test_as_a_process_bad_input_shows_no_traceback() -> None:
    result = run("run", "Hi", "--budget", "3")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: a budget of 3 tokens")
    assert "Traceback" not in result.stderr


# -- Ctrl-C --


@pytest.fixture
def pressed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the ninth call of the model."""
    model, tokenizer = load(TINY_MODEL)
    calls = 0

    def press(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            signal.raise_signal(signal.SIGINT)

    model.model.layers[3].register_forward_pre_hook(press)
    monkeypatch.setattr("modicum.cli.run.load", lambda *_: (model, tokenizer))
    monkeypatch.setattr("modicum.cli.keep.load", lambda *_: (model, tokenizer))


@pytest.mark.usefixtures("pressed")
def test_ctrl_c_shows_what_there_is_and_the_table(tiny: Any) -> None:
    whole = generate(*tiny, PROMPT, max_new_tokens=40, **SETTINGS)
    result = call("run", PROMPT, *TIGHT, "-n", "40")
    assert result.exit_code == 130
    text = result.stdout.partition("\n")[0]
    assert text
    assert whole.text.startswith(text)
    assert "tokens, interrupted" in result.stdout
    assert result.stderr == ""


@pytest.mark.usefixtures("pressed")
def test_ctrl_c_with_json_is_json_still(tiny: Any) -> None:
    result = call("run", PROMPT, *TIGHT, "-n", "40", "--json")
    told = json.loads(result.stdout)
    assert (result.exit_code, told["finish_reason"]) == (130, "interrupted")
    assert told["seen"] == told["prompt_tokens"] + len(told["tokens"])


@pytest.mark.usefixtures("pressed")
def test_ctrl_c_ends_the_questions() -> None:
    result = call("run", "--sample", "-q", " Then Tom", "-q", " She", "-n", "4", "--json")
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.endswith("interrupted\n")


@pytest.mark.usefixtures("pressed")
def test_ctrl_c_while_reading_for_a_picture(tmp_path: Path) -> None:
    result = call("keep", "--sample", "--out", str(tmp_path / "kept.png"))
    assert result.exit_code == 130
    assert not (tmp_path / "kept.png").exists()


def test_ctrl_c_on_the_real_thing() -> None:
    """Beyond its training the model babbles on, so there is always an answer to interrupt."""
    arguments = ["run", "--sample", "--budget", "128", "-n", "200000"]
    with subprocess.Popen(
        [sys.executable, "-m", "modicum", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # What a shell starts in the background ignores SIGINT, and so would all that the tests start there.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read().decode()
        complaints = process.stderr.read().decode()
    assert first
    assert process.returncode == 130
    assert "tokens, interrupted" in rest
    assert "Traceback" not in complaints
