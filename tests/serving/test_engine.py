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
from modicum.loading import find

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
        logits = model(line[:, start : start + CHUNK], past_key_values=cache, use_cache=True).logits
    tokens = [int(logits[0, -1].argmax())]
    while len(tokens) < new:
        logits = model(torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True).logits
        tokens.append(int(logits[0, -1].argmax()))
    kept = [cache.positions(i)[0].sort(-1).values.tolist() for i in range(len(cache.layers))]
    return tokens, kept


def test_with_room_for_all_the_tokens_are_vllms_own(tmp_path: Path) -> None:
    batch = prompts(40, 150, 333, 64)
    stock = ask(tmp_path, {"batches": [batch]})
    ours = ask(tmp_path, {"batches": [batch], "modicum": {**TIGHT, "budget": 512}})
    assert ours["tokens"] == stock["tokens"]


@pytest.mark.parametrize(
    "policy", ["keydiff", "manifoldkv", "knorm", "streamingllm", "tova", "snapkv(window=16)", "caote+tova"]
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
    few = {"num_gpu_blocks_override": 2 * PAGES + 1}
    scarce = ask(tmp_path, {"batches": [batch, batch], "modicum": TIGHT, "engine": few})
    assert max(len(ids) for ids in batch) > few["num_gpu_blocks_override"] * BLOCK
    assert [len(t) for t in scarce["tokens"][0]] == [24] * len(batch)
    assert max(scarce["most"]) <= PAGES
    for answer in (one_by_one, together, scarce):
        assert len(set(answer["free"])) == 1
