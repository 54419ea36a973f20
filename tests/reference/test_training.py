"""Training: a run stops, goes on, starts from another model, and is exported."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import modicum
from modicum.errors import InputError
from modicum.reference.recipe import Stage
from modicum.reference.train import Training
from tests.bounds import LAMBDA, assert_within, network_error
from tests.reference.tiny import TINY


def test_a_stopped_run_goes_on_as_if_never_stopped(data: Path, tmp_path: Path) -> None:
    whole = Training(TINY, [data], tmp_path / "whole")
    for _ in range(8):
        whole.advance()
    first = Training(TINY, [data], tmp_path / "parts")
    for _ in range(5):
        first.advance()
    first.save()
    first.advance()  # killed before the next checkpoint: logged, but lost
    second = Training(TINY, [data], tmp_path / "parts")
    assert second.step == 5
    while second.step < 8:
        second.advance()
    for (name, one), two in zip(
        whole.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), name
    logged = [json.loads(line)["step"] for line in (tmp_path / "parts/log.jsonl").read_text().splitlines()]
    assert logged == list(range(1, 9))


def test_a_run_ends_with_its_tokens_and_promotes(data: Path, tmp_path: Path) -> None:
    training = Training(TINY, [data], tmp_path / "run")
    training.run()
    assert training.tokens >= TINY.total_tokens
    lengths = [json.loads(line)["length"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert lengths[:4] == [64] * 4  # 1,024 tokens in steps of 256, as no mark was passed
    assert set(lengths[4:]) == {128}


def test_another_models_checkpoint_is_refused(data: Path, tmp_path: Path) -> None:
    Training(TINY, [data], tmp_path / "run").save()
    with pytest.raises(InputError, match="trained with hidden 32, not 48"):
        Training(replace(TINY, hidden=48), [data], tmp_path / "run")


def test_an_exported_model_loads_and_is_the_same(data: Path, tmp_path: Path) -> None:
    training = Training(TINY, [data], tmp_path / "run")
    training.export(tmp_path / "model")
    model, tokenizer = modicum.load(tmp_path / "model", device="cpu")
    assert model.dtype == torch.float32  # bfloat16 on disk only: it is slow where a CPU lacks it
    ids = torch.tensor([tokenizer("The miller yawned")["input_ids"]])
    with torch.no_grad():
        ours = training.model(ids).logits
        theirs = model(ids).logits
    share = LAMBDA * network_error(training.model, ids.shape[1], dtype=torch.bfloat16)
    assert_within(theirs, ours, share * float(ours.square().mean().sqrt()))  # weights are stored in bfloat16
    assert (tmp_path / "model/model.safetensors").stat().st_size < 2.2 * sum(
        p.numel() for p in training.model.parameters()
    )


def test_the_mean_of_two_checkpoints_is_exported(data: Path, tmp_path: Path) -> None:
    training = Training(TINY, [data], tmp_path / "run")
    training.advance()
    training.save()
    shutil.copy(tmp_path / "run/checkpoint.pt", tmp_path / "earlier.pt")
    before = {name: weight.clone() for name, weight in training.model.state_dict().items()}
    for _ in range(3):
        training.advance()
    training.export(tmp_path / "mean", tmp_path / "earlier.pt")
    written = modicum.load(tmp_path / "mean", device="cpu")[0].state_dict()
    for name, weight in training.model.state_dict().items():
        assert torch.equal(written[name], ((weight + before[name]) / 2).bfloat16().float()), name
    with pytest.raises(InputError, match="no checkpoint"):
        training.export(tmp_path / "none", tmp_path / "missing.pt")


def test_a_new_run_starts_from_an_exported_model(data: Path, tmp_path: Path) -> None:
    """With its weights and tokenizer, at the stage that is asked for; a run that is there goes on instead."""
    old = Training(TINY, [data], tmp_path / "old")
    for _ in range(3):
        old.advance()
    old.export(tmp_path / "model")
    new = Training(TINY, [data], tmp_path / "new", start=tmp_path / "model", stage=1)
    for name, weight in new.model.state_dict().items():
        assert torch.equal(weight, old.model.state_dict()[name].bfloat16().float()), name
    text = "A miller, 1920"
    encoded = [one.tokenizer.encode(text, add_special_tokens=False).ids for one in (old, new)]
    assert encoded[0] == encoded[1]
    assert (new.step, new.tokens, new.stage) == (0, 1024, 1)
    assert new.advance()["length"] == 128
    new.save()
    again = Training(TINY, [data], tmp_path / "new")
    assert (again.step, again.stage) == (1, 1)
    assert again.tokenizer.to_str() == new.tokenizer.to_str()
    assert torch.equal(again.model.lm_head.weight, new.model.lm_head.weight)


def test_a_start_that_does_not_fit_is_refused(data: Path, tmp_path: Path) -> None:
    Training(TINY, [data], tmp_path / "old").export(tmp_path / "model")
    wide = replace(TINY, hidden=48)
    with pytest.raises(InputError, match="sizes of the recipe"):
        Training(wide, [data], tmp_path / "wide", start=tmp_path / "model")
    with pytest.raises(InputError, match="no stage 2: the recipe has 0 to 1"):
        Training(TINY, [data], tmp_path / "late", start=tmp_path / "model", stage=2)
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(InputError, match="--export"):
        Training(TINY, [data], tmp_path / "none", start=tmp_path / "model")


def test_a_whole_stage_ends_with_its_tokens(data: Path, tmp_path: Path) -> None:
    """However many answers are right; without `whole` the mark ends it sooner."""
    stages = {
        whole: (Stage(64, 256, {"copy": 1.0}, 256 * 30, whole=whole), TINY.stages[1])
        for whole in (True, False)
    }
    ends = {}
    for whole, its in stages.items():
        recipe = replace(TINY, stages=its, pass_mark=0.0, total_tokens=10**6)
        training = Training(recipe, [data], tmp_path / str(whole))
        while training.stage == 0:
            training.advance()
        ends[whole] = training.step
    assert ends == {True: 30, False: 20}


def test_products_in_bfloat16(data: Path, tmp_path: Path) -> None:
    """Weights and gradients stay in float32; the loss is near the other one."""
    exact = Training(TINY, [data], tmp_path / "a").advance()
    rough = Training(TINY, [data], tmp_path / "b", bfloat16=True)
    line = rough.advance()
    # A loss moves by at most twice its logits, which have a root mean square of about 1 before training.
    bound = 2 * LAMBDA * network_error(rough.model, 256, dtype=torch.bfloat16)
    assert abs(line["loss"] - exact["loss"]) <= bound
    assert line["loss"] != exact["loss"]
    assert {p.dtype for p in rough.model.parameters()} == {torch.float32}
