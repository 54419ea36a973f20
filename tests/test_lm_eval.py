"""lm-evaluation-harness with the cache under a budget, on small tasks of our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: make test-lm-eval")

from modicum.lm_eval import BudgetLM
from tests.tiny_model import TINY_MODEL


@pytest.fixture(scope="module")
def full() -> BudgetLM:
    """With room for everything."""
    return BudgetLM(str(TINY_MODEL), budget=500, dtype="float64")


def requests(*given: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=args) for args in given]


def by_one_call(lm: BudgetLM, context: list[int], target: list[int]) -> tuple[float, bool]:
    """From the logits of one call of the model without a cache."""
    with torch.no_grad():
        logits = lm.model(torch.tensor([context + target]), use_cache=False).logits[0].double()
    rows = logits[len(context) - 1 : -1].log_softmax(-1)
    wanted = torch.tensor(target)
    return float(rows[torch.arange(len(target)), wanted].sum()), bool((rows.argmax(-1) == wanted).all())


def test_likelihoods_are_the_models_where_all_fits(full: BudgetLM) -> None:
    pairs = [("The dog saw", " that"), ("The dog saw", " the boat"), ("The dog saw ", "Tom"), ("", "One day")]
    found = full.loglikelihood(requests(*pairs))
    for (context, continuation), got in zip(pairs, found, strict=True):
        ids, target = full._encode_pair(context, continuation)
        wanted = by_one_call(full, ids, target)
        assert got[0] == pytest.approx(wanted[0], rel=1e-5)  # log-softmax in float32
        assert got[1] == wanted[1]


def test_a_context_longer_than_the_model_loses_its_beginning(full: BudgetLM) -> None:
    ids, target = full._encode_pair("dog " * 600, " boat")
    assert len(ids) + len(target) == full.max_length + 1
    assert len(full.loglikelihood(requests(("dog " * 600, " boat")))) == 1


def test_rolling_likelihood_predicts_every_token_once(full: BudgetLM) -> None:
    text = "Every morning some children walked through our garden."
    ids = full._ids(text)
    wanted = by_one_call(full, [full._prefix], ids)[0]
    assert full.loglikelihood_rolling(requests((text,)))[0] == pytest.approx(wanted, rel=1e-5)


def test_answers_are_the_models_and_end_before_a_stop_string(full: BudgetLM) -> None:
    ids = torch.tensor([full.tokenizer("The bird was")["input_ids"]])
    new = full.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    text = full.tokenizer.decode(new, skip_special_tokens=True)
    settings = {"until": [], "max_gen_toks": 12, "do_sample": False}
    assert full.generate_until(requests(("The bird was", settings)))[0].strip() == text.strip()
    stop = text.strip()[4:7]
    cut = full.generate_until(requests(("The bird was", {**settings, "until": [stop]})))[0]
    assert cut.strip() == text.strip().split(stop, 1)[0].strip()


def test_the_harness_runs_a_local_task_under_a_budget(tmp_path: Path) -> None:
    """The whole command: a task in YAML with its data, a model under a budget, results as JSON."""
    asked = {"question": "The dog " * 60 + "saw", "choices": [" that", " moon"]}
    rows = [{**asked, "answer": i % 2} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = {
        "task": "local_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "local_choice.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "modicum.lm_eval", "run", "--model", "modicum"]
    command += ["--model_args", f"pretrained={TINY_MODEL},policy=keydiff,budget=50%,recent=8"]
    command += ["--tasks", "local_choice", "--include_path", str(tmp_path), "--output_path", str(out)]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next(out.rglob("results*.json")).read_text(encoding="utf-8"))
    assert results["results"]["local_choice"]["acc,none"] == 0.5  # all are alike, and half are right
