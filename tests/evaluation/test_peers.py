"""benchmarks/peers, what runs in modicum's environment: transformers' side, the counting, the joint table."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modicum.evaluation.row import Cell, Row
from tests.bounds import assert_same_logits

_FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"
_CONTEXT = [(7 * i * i + 3) % 61 + 1 for i in range(90)]
_QUESTION = [5, 9, 2, 40, 11]
_TOKEN = 2 * 2 * (2 * 16) * 4  # layers × KV heads × keys and values × fp32


@pytest.fixture(scope="module", autouse=True)
def peers() -> Iterator[None]:
    """The scripts import each other by their bare names, as a peer's environment has no package of ours."""
    before = set(sys.modules)
    sys.path.insert(0, str(_FOLDER))
    yield
    sys.path.remove(str(_FOLDER))
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(_FOLDER) in str(sys.modules[name].__file__):
            del sys.modules[name]


def module(name: str) -> ModuleType:
    return __import__(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.3,
    )
    made = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).eval().save_pretrained(made)
    return made


def result(folder: Path, policy: str, share: float | None = None, chunk: int | None = None) -> Any:
    job, peer = module("job"), module("transformers_eval")
    ask = job.Ask("a", _CONTEXT, _QUESTION, 8, True)
    return peer.run(
        job.Job(str(folder), "float32", [], [ask], [], []), ask, job.Setting(policy, "", share, chunk)
    )


def test_the_full_cache_answers_as_generate_does_and_its_bytes_are_counted_exactly(folder: Path) -> None:
    got = result(folder, "full")
    model: Any = LlamaForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([_CONTEXT + _QUESTION])
    wanted = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert got.tokens == wanted.tolist()
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    assert_same_logits(model, torch.tensor(got.logits)[None], logits[None], tokens=ids.shape[1])
    assert got.context_bytes == 90 * _TOKEN
    assert got.held_bytes == got.peak_bytes == (90 + 5 + 7) * _TOKEN
    assert got.held_tokens == (90, 90)


def test_a_window_over_everything_is_the_full_cache(folder: Path) -> None:
    full, wide = result(folder, "full"), result(folder, "sliding window", 2.0)
    assert wide.tokens == full.tokens
    assert wide.logits == full.logits


def test_a_window_holds_its_share_and_chunks_do_not_change_what_it_says(folder: Path) -> None:
    whole, chunked = (result(folder, "sliding window", 0.2, chunk) for chunk in (None, 20))
    assert whole.tokens == chunked.tokens
    model: Any = LlamaForCausalLM.from_pretrained(folder).eval()
    found, wanted = (torch.tensor(it.logits)[None] for it in (chunked, whole))
    assert_same_logits(model, found, wanted, tokens=len(_CONTEXT + _QUESTION))
    assert whole.logits != result(folder, "full").logits
    assert whole.held_tokens == chunked.held_tokens == (18, 18)
    # What is kept of a call is a view of all that it attended to, so that is what stays in memory.
    assert whole.context_bytes == 90 * _TOKEN
    assert chunked.context_bytes == (18 + 10) * _TOKEN  # the last chunk has 10 tokens
    assert whole.held_bytes == chunked.held_bytes == 19 * _TOKEN
    assert chunked.peak_bytes < whole.peak_bytes


def test_fp8_holds_a_byte_for_each_number(folder: Path) -> None:
    job = module("job")
    try:
        got = result(folder, "QuantizedCache(fp8)")
    except job.UnsupportedError as error:
        pytest.skip(f"this transformers has no such cache: {error}")
    scales = 2 * 2 * 4  # layers × keys and values × fp32
    assert got.context_bytes == 90 * _TOKEN // 4 + scales
    assert got.peak_bytes > got.held_bytes  # a layer dequantised


def test_what_transformers_cannot_do_is_refused_with_its_reason(folder: Path) -> None:
    job = module("job")
    with pytest.raises(job.UnsupportedError, match="no cache 'ring'"):
        result(folder, "ring")


def test_storage_is_counted_once_and_whole() -> None:
    nbytes = module("measure").nbytes
    whole = torch.zeros(100, dtype=torch.float32)
    assert nbytes(whole, whole[:10]) == nbytes(whole[:10]) == 400
    assert nbytes([whole, {"a": (torch.zeros(3, dtype=torch.int64),)}], None, "x", 3) == 424
    assert nbytes(torch.zeros(0)) == 0


def test_a_job_comes_back_from_its_file(tmp_path: Path) -> None:
    job = module("job")
    asks = [job.Ask("a#0", [1, 2], [3], 4, True)]
    settings = [job.Setting("SnapKVPress", "25%", 0.25), job.Setting("full", "full", None, 256)]
    made = job.Job("m", "float32", [0], asks, settings, [(0, 1), (0, 0)])
    made.write(tmp_path / "job.json")
    assert job.Job.read(tmp_path / "job.json") == made


def row(system: str, policy: str, index: int, score: float, budget: str = "25%", **extra: Any) -> Row:
    cell = Cell(system, "m", policy, budget, "vt:hops=2", 64, "hidden", None, 0, "float32")
    return Row(
        cell, index, score, "string_match_all", f"says {index}", ["x"], 60, 4, None,
        2**20, 2**19, 2**21, 2**22, (15, 15), 0.5, 0.3, {"transformers": "5"}, extra,
    )  # fmt: skip


def write(folder: Path, rows: list[Row], refused: list[dict[str, Any]]) -> Any:
    (folder / "rows.jsonl").write_text("".join(json.dumps(r.to_dict()) + "\n" for r in rows))
    (folder / "refused.jsonl").write_text("".join(json.dumps(r) + "\n" for r in refused))
    return module("joint").Joint.read(folder)


def test_the_table_leaves_out_samples_that_a_setting_lacks(tmp_path: Path) -> None:
    rows = [row("kvpress", "KnormPress", i, s) for i, s in enumerate((1.0, 0.0, 1.0))]
    rows += [row("modicum", "knorm", i, s) for i, s in enumerate((0.0, 1.0))]
    joint = write(tmp_path, rows, [])
    theirs, ours = joint.to_dict()["lines"]
    assert (theirs["system"], theirs["method"], theirs["count"], theirs["score"]) == (
        "kvpress",
        "Knorm",
        2,
        0.5,
    )
    assert (ours["system"], ours["method"], ours["count"], ours["score"]) == ("modicum", "Knorm", 2, 0.5)
    assert ours["decode_seconds_per_token"] == pytest.approx(0.1)
    assert (
        "| Knorm | kvpress | one shot | 0.500 (0.09–0.91) | 0.00 | 0.50 | 1.00 | 2.00 |" in joint.markdown()
    )


def test_a_budget_is_complete_by_itself(tmp_path: Path) -> None:
    rows = [row("kvpress", "KnormPress", i, 1.0) for i in range(3)]
    rows += [row("kvpress", "KnormPress", 0, 1.0, "50%"), row("modicum", "knorm", 0, 1.0, "50%+answer")]
    rows += [row("kvpress", "KnormPress", 1, 1.0, "50%")]
    told = {
        (line["system"], line["budget"]): line["count"]
        for line in write(tmp_path, rows, []).to_dict()["lines"]
    }
    assert told == {("kvpress", "25%"): 3, ("kvpress", "50%"): 1, ("modicum", "50%+answer"): 1}


def test_begun_is_the_share_of_an_answer_said_before_the_first_wrong_letter() -> None:
    begun = module("joint").begun
    assert begun(" 7201.\nWhat", ["7201522"]) == pytest.approx(4 / 7)
    assert begun(" ABc d", ["xyz", "abc"]) == 1.0
    assert begun("the 7201522", ["7201522"]) == begun("", ["7"]) == 0.0


def test_what_is_not_supported_has_a_line_and_no_number(tmp_path: Path) -> None:
    refused = {
        "system": "kvpress",
        "policy": "TOVAPress",
        "budget": "25%",
        "chunk": None,
        "reason": "no|t here",
    }
    rows = [row("kvpress", "KnormPress", 0, 1.0), row("kvpress", "TOVAPress", 0, 1.0)]
    joint = write(tmp_path, rows, [refused])
    assert "| TOVA | kvpress | one shot | not supported: no/t here |" in joint.markdown()
    assert [line["policy"] for line in joint.to_dict()["lines"] if "score" in line] == ["KnormPress"]


def test_full_caches_are_compared_with_transformers_own(tmp_path: Path) -> None:
    rows = [row("transformers", "full", i, 1.0, "full") for i in range(2)]
    rows += [row("kvpress", "full", i, 1.0, "full") for i in range(2)]
    rows[-1] = replace(rows[-1], output="something else")
    notes = [
        {"system": "transformers", "chunk": None, "sample": "vt#0", "logits": [1.0, 2.0]},
        {"system": "kvpress", "chunk": None, "sample": "vt#0", "logits": [1.0, 2.25]},
    ]
    (tmp_path / "full.jsonl").write_text("".join(json.dumps(n) + "\n" for n in notes))
    told = {t["system"]: t for t in write(tmp_path, rows, []).agreement()}
    assert (told["kvpress"]["same_output"], told["kvpress"]["samples"]) == (1, 2)
    assert told["kvpress"]["logits_apart"] == 0.25
    assert told["transformers"]["logits_apart"] == 0.0


def test_the_table_goes_between_the_markers_and_nowhere_else(tmp_path: Path) -> None:
    joint = write(tmp_path, [row("kvpress", "KnormPress", 0, 1.0)], [])
    page = tmp_path / "page.md"
    page.write_text("text")
    with pytest.raises(SystemExit, match="has no lines"):
        joint.write_into(page)
    begin, end = module("joint").BEGIN, module("joint").END
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    joint.write_into(page)
    joint.write_into(page)
    text = page.read_text()
    assert text.startswith(f"before\n{begin}\n\n| full cache of")
    assert text.endswith(f"{end}\nafter\n")
    assert "old" not in text
    assert text.count("Knorm") == 1
