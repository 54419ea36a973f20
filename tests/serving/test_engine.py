"""The plug-in inside a real vLLM engine: stock tokens, transformers' tokens, and pages after every step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import modicum
from modicum import BudgetCache
from modicum.compat import cache_kwargs
from modicum.loading import find
from tests.bounds import exactly

pytest.importorskip("vllm", reason="run by `make test-vllm`, in an environment that has vLLM")

MODEL = str(find("reference"))
CHUNK, BLOCK = 64, 32
TIGHT = {"policy": "keydiff", "budget": 96, "n_sink": 4, "recent": 16}
PAGES = -(-(96 + CHUNK) // BLOCK)


def ask(tmp_path: Path, job: dict[str, Any], fails: bool = False) -> Any:
    """What an engine in a process of its own answers."""
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"model": MODEL, "max_tokens": 24, **job}))
    command = [sys.executable, str(Path(__file__).parent / "ask.py"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **job.get("env", {})})
    if fails:
        assert done.returncode
        return done.stderr
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def prompts(*lengths: int) -> list[list[int]]:
    """Tokens that look like nothing in particular."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(5, 2000, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def by_transformers(ids: list[int], how: dict[str, Any], new: int) -> tuple[list[int], list[list[list[int]]]]:
    """Greedy tokens and what is held at the end, through a BudgetCache with vLLM's chunks."""
    model, _ = modicum.load("reference", dtype="float32")
    cache = BudgetCache(model, **how, chunk=CHUNK)
    line = torch.tensor([ids])
    for start in range(0, len(ids), CHUNK):
        logits = model(line[:, start : start + CHUNK], **cache_kwargs(model, cache), use_cache=True).logits
    tokens = [int(logits[0, -1].argmax())]
    while len(tokens) < new:
        logits = model(torch.tensor([tokens[-1:]]), **cache_kwargs(model, cache), use_cache=True).logits
        tokens.append(int(logits[0, -1].argmax()))
    kept = [cache.positions(i)[0].sort(-1).values.tolist() for i in range(len(cache.layers))]
    return tokens, kept


def test_with_room_for_all_the_tokens_are_vllms_own(tmp_path: Path) -> None:
    """Also where vLLM compiles the model, as it does unless told otherwise."""
    batch = prompts(40, 150, 333, 64)
    stock = ask(tmp_path, {"batches": [batch]})
    roomy = {"batches": [batch], "modicum": {**TIGHT, "budget": 512}}
    assert ask(tmp_path, roomy)["tokens"] == stock["tokens"]
    compiled = ask(tmp_path, {**roomy, "engine": {"enforce_eager": False}})
    assert (
        compiled["tokens"]
        == ask(tmp_path, {"batches": [batch], "engine": {"enforce_eager": False}})["tokens"]
    )


def test_bfloat16_runs_within_its_rounding(tmp_path: Path) -> None:
    """Where vLLM may prefer kernels for AMX, whose pages lie otherwise."""
    batch = prompts(40, 150, 333, 64)
    half: dict[str, Any] = {"engine": {"dtype": "bfloat16"}, "batches": [batch]}
    stock = ask(tmp_path, half)
    ours = ask(tmp_path, {**half, "modicum": {**TIGHT, "budget": 512}})
    assert [t[0] for t in ours["tokens"][0]] == [t[0] for t in stock["tokens"][0]]
    one = ask(tmp_path, {**half, "batches": [batch[2:3]], "modicum": TIGHT, "max_tokens": 1})
    _, exact = by_transformers(batch[2], TIGHT, 1)
    for mine, theirs in zip(one["kept"][0], exact, strict=True):
        for head, other in zip(mine, theirs, strict=True):
            assert len(set(head)) == 96
            assert len(set(head) & set(other)) > 86


@pytest.mark.parametrize(
    "policy",
    [
        "keydiff",
        "manifoldkv",
        "knorm",
        "streamingllm",
        "tova",
        "snapkv(window=16)",
        "ahakv(window=16)",
        "caote+tova",
        "random",
    ],
)
@pytest.mark.parametrize("evict_every", [1, 4])
def test_tokens_and_what_is_held_are_those_of_transformers(
    policy: str, evict_every: int, tmp_path: Path
) -> None:
    if evict_every > 1 and policy not in ("keydiff", "snapkv(window=16)"):
        pytest.skip("one policy of each kind is enough")
    how = {**TIGHT, "policy": policy, "evict_every": evict_every}
    batches = [[ids] for ids in prompts(350, 130)]
    got = ask(tmp_path, {"batches": batches, "modicum": how})
    for number, [ids] in enumerate(batches):
        tokens, kept = by_transformers(ids, how, 24)
        assert got["tokens"][number][0] == tokens
        assert got["kept"][number] == kept
    assert max(got["most"]) == PAGES


def test_a_request_is_itself_in_any_company_and_no_page_is_lost(tmp_path: Path) -> None:
    """Mixed prefill and decode, a prompt longer than the pool, pages used again, and preemption."""
    batch = prompts(700, 30, 420, 64, 1500, 90, 200, 350)
    one_by_one = ask(tmp_path, {"batches": [[ids] for ids in batch], "modicum": TIGHT})
    alone = [tokens[0] for tokens in one_by_one["tokens"]]
    assert max(one_by_one["most"]) == PAGES
    together = ask(tmp_path, {"batches": [batch, batch[::-1]], "modicum": TIGHT})
    assert together["tokens"][0] == together["tokens"][1][::-1] == alone
    assert max(together["together"]) > 4
    for answer in (one_by_one, together):
        assert len(set(answer["free"])) == 1
        # vLLM's figure, for requests of any length: the pool over an arena
        assert answer["concurrency"] == exactly((answer["free"][0] + 1) / PAGES)


def test_a_prompt_longer_than_the_pool_and_requests_that_wait_again(tmp_path: Path) -> None:
    """What was generated becomes prompt when a request is resumed, and its tokens follow from that."""
    batch = prompts(700, 30, 420, 64, 90, 200, 20, 350)
    few = {"num_gpu_blocks_override": 2 * PAGES + 1}
    assert max(len(ids) for ids in batch) > few["num_gpu_blocks_override"] * BLOCK
    how = {"batches": [batch], "modicum": TIGHT, "engine": few, "max_tokens": 60}
    scarce = ask(tmp_path, how)
    assert scarce["preempted"]
    assert max(scarce["most"]) <= PAGES
    assert len(set(scarce["free"])) == 1
    resumed = {
        length: [g for n, g in scarce["preempted"] if n == length] for length, _ in scarce["preempted"]
    }
    for ids, tokens in zip(batch, scarce["tokens"][0], strict=True):
        assert len(tokens) == 60
        said = max(resumed.get(len(ids), [0]))  # tokens that were there when it last began anew
        expected, _ = by_transformers(ids + tokens[:said], TIGHT, 60 - said)
        assert tokens[said:] == expected


def test_a_request_given_up_while_its_prompt_is_read_frees_all_and_leaves_nothing(tmp_path: Path) -> None:
    [long, short] = prompts(900, 200)
    [clean] = ask(tmp_path, {"batches": [[short]], "modicum": TIGHT})["tokens"]
    after = ask(tmp_path, {"batches": [[short]], "modicum": TIGHT, "abort": [long, long]})
    assert after["tokens"] == [clean]
    assert len(set(after["free"])) == 1


def test_two_workers_give_the_tokens_of_one(tmp_path: Path) -> None:
    """Tensor parallelism: each worker has half of the heads."""
    batch = prompts(350, 130)
    for how in (TIGHT, {**TIGHT, "policy": "snapkv(window=16)", "evict_every": 4}):
        one = ask(tmp_path, {"batches": [batch], "modicum": how})
        both = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
        threads = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
        two = ask(
            tmp_path, {"batches": [batch], "modicum": how, "engine": both, "watch": False, "env": threads}
        )
        assert two["tokens"] == one["tokens"]


def test_without_the_plug_in_its_scheduler_refuses_to_start(tmp_path: Path) -> None:
    """Nothing would be held to the budget."""
    said = ask(tmp_path, {"batches": [], "modicum": TIGHT, "env": {"VLLM_PLUGINS": "none"}}, fails=True)
    assert "knows no arenas" in said


def test_a_model_with_windows_is_refused_by_the_engine_too(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 256}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 64}
    MistralForCausalLM(MistralConfig(**shape, **heads, max_position_embeddings=512)).save_pretrained(tmp_path)
    job = {"model": str(tmp_path), "batches": [], "modicum": TIGHT, "engine": {"max_model_len": 256}}
    assert "needs full causal attention in every layer" in ask(tmp_path, job, fails=True)
