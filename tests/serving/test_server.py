"""`modicum serve` as a user runs it: a real server, many clients at once, some of which hang up."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modicum.loading import find
from modicum.texts import sample_text

pytest.importorskip("vllm", reason="run by `make test-vllm`, in an environment that has vLLM")

BUDGET, CHUNK, BLOCK = 96, 64, 32
MODICUM = [sys.executable, "-m", "modicum"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of the reference model under a budget."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*MODICUM, "serve", "reference", "--policy", "keydiff", "--budget", str(BUDGET)]
    command += ["--chunk", str(CHUNK), "--recent", "16", "--block-size", str(BLOCK), "--max-num-seqs", "32"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    folder = tmp_path_factory.mktemp("server")
    command += ["--chat-template", "{% for message in messages %}{{ message.content }} {% endfor %}"]
    log = folder / "log.txt"
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        address = f"http://127.0.0.1:{port}"
        try:
            _await(address, process, log)
            yield address
        finally:
            process.terminate()
            process.wait(60)


def _await(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(240):
        if process.poll() is not None:
            raise AssertionError(f"the server ended:\n{log.read_text()[-3000:]}")
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"the server did not come up:\n{log.read_text()[-3000:]}")


def metrics(address: str) -> dict[str, float]:
    """Every metric by its name, labels left out; of several with one name the last."""
    text = urllib.request.urlopen(f"{address}/metrics", timeout=10).read().decode()
    return {m[1]: float(m[2]) for m in re.finditer(r"^([\w:]+)(?:{.*})? ([\d.e+-]+)$", text, re.MULTILINE)}


def test_a_chat_about_a_text_of_four_times_the_budget_streams(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's own example."""
    pytest.importorskip("openai")
    text = sample_text()[:2000]
    (tmp_path / "text.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    [example] = re.findall(r"^```py\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert "http://localhost:8000" in example
    exec(example.replace("http://localhost:8000", server), {})
    assert len(capsys.readouterr().out) > 100
    found = metrics(server)
    assert found["modicum:budget_tokens"] == BUDGET
    assert 0 < found["modicum:most_held_tokens"] <= BUDGET
    assert found["modicum:seen_tokens_total"] > 4 * BUDGET
    assert found["modicum:evicted_tokens_total"] > 0


def test_two_hundred_clients_some_of_which_hang_up_leave_no_page_behind(server: str) -> None:
    import httpx

    chance = random.Random(5)
    text = sample_text()

    async def one(client: Any, number: int) -> str:
        start = chance.randrange(10_000)
        prompt = text[start : start + chance.randrange(20, 3000)]
        body = {"model": "reference", "prompt": prompt, "max_tokens": 16, "stream": True, "ignore_eos": True}
        leave = number % 7 == 0
        told = 0
        async with client.stream("POST", f"{server}/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    told += len(json.loads(line[6:])["choices"])
                if leave and told >= chance.randrange(3):
                    return "left"
        return "whole" if told else "nothing"

    async def all_of_them() -> list[str]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(timeout=300, limits=limits) as client:
            return await asyncio.gather(*(one(client, i) for i in range(200)))

    ends = asyncio.run(all_of_them())
    assert ends.count("nothing") == 0
    assert ends.count("left") == 29
    for _ in range(60):
        found = metrics(server)
        if not found["vllm:num_requests_running"] and not found["vllm:num_requests_waiting"]:
            break
        time.sleep(1)
    assert found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0
    assert found["vllm:kv_cache_usage_perc"] == 0
    assert found["modicum:most_held_tokens"] <= BUDGET


def test_a_request_longer_than_the_model_is_vllms_own_error(server: str) -> None:
    body = json.dumps({"model": "reference", "prompt": list(range(5, 1005)) * 5, "max_tokens": 8}).encode()
    request = urllib.request.Request(f"{server}/v1/completions", body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    assert caught.value.code == 400
    assert "maximum context length" in caught.value.read().decode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral", "sliding_window": 64}, "sliding windows"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 8}, "latent attention"),
    ],
)
def test_a_model_that_cannot_be_held_is_refused_before_it_loads(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = json.loads((find("reference") / "config.json").read_text())  # type: ignore[operator]
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / "tokenizer.json").write_text("{}")
    done = subprocess.run([*MODICUM, "serve", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_another_release_of_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from modicum.errors import ModicumError
    from modicum.vllm import version

    version.check()
    monkeypatch.setattr(version, "version", lambda _: "0.40.1")
    with pytest.raises(ModicumError, match=r"from 0\.32 and before 0\.33, this is 0\.40\.1"):
        version.check()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reference", "--policy", "keydif"], "did you mean keydiff"),
        (["reference", "--policy", "razor"], "cannot run inside vLLM"),
        (["reference", "--budget", "16"], "too small"),
        (["reference", "--budget", "60", "--block-size", "64"], "less than a page"),
        (["reference", "--enable-prefix-caching"], "--enable-prefix-caching"),
        (["reference", "--speculative-config", "{}"], "--speculative-config"),
        (["./missing"], "no folder"),
    ],
)
def test_bad_input_is_one_line_before_anything_loads(arguments: list[str], message: str) -> None:
    done = subprocess.run([*MODICUM, "serve", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
