"""Students that learn: masks and formats that stay, runs that go on, and what is refused."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import modicum
from modicum.cli import app
from modicum.distill import (
    DistillSettings,
    Ensemble,
    SparseTargets,
    Student,
    TargetsHeader,
    TargetsWriter,
    TrainingSettings,
    distill,
    record,
    train,
)
from modicum.distill.checkpoint import TrainingCheckpoint
from modicum.distill.sequences import Questions, with_questions
from modicum.distill.teachers import open_teachers
from modicum.errors import InputError, ModelError, TargetsError
from modicum.weights import packed, save
from tests.bounds import gamma, logits_bound
from tests.distill import reference
from tests.tiny_model import TINY_MODEL, VOCAB_SIZE

TEXT = modicum.sample_text()[:12_000]
FEW = DistillSettings(
    keep="topk=8",
    sequences=6,
    length=24,
    device="cpu",
    training=TrainingSettings(epochs=2, batch=4, learning_rate=1e-3, save_every=1),
)


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders packed, dense and half (packed, in bfloat16), of the tiny model pruned to 60 %."""
    folder = tmp_path_factory.mktemp("students")
    for name, dtype in (("packed", "float32"), ("dense", "float32"), ("half", "bfloat16")):
        model, tokenizer = modicum.load(TINY_MODEL, dtype=dtype, device="cpu")
        report = modicum.prune(
            model, TEXT, tokenizer=tokenizer, sparsity=0.6, refine=None, sequences=4, length=24
        )
        save(report, model, tokenizer, folder / name, format="dense" if name == "dense" else "packed")
    return folder


def zeros(folder: Path) -> dict[str, Tensor]:
    """Where a dense checkpoint has no zeros."""
    return {name: value != 0 for name, value in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("form", ["packed", "half", "dense"])
def test_masks_and_format_stay_and_the_loss_falls(form: str, students: Path, tmp_path: Path) -> None:
    source, out = students / form, tmp_path / "out"
    settings = replace(FEW, training=replace(FEW.training, epochs=8))
    report = distill(source, [str(TINY_MODEL)], [TEXT], out, settings)
    assert len(report.losses) == 8 * 2
    assert report.losses[-1] < report.losses[0]
    assert report.targets.frames == 6 * 23
    assert not (out / "state").exists()
    told = json.loads((out / "report.json").read_text())
    assert told["distilled"]["targets"]["kept_classes"] == 8
    assert told["method"] == "wanda"  # what pruning told stays
    assert told["file_bytes"] == report.file_bytes
    if form == "dense":
        before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
        masks, found = zeros(source), zeros(out)
    else:
        assert not (out / "model.safetensors").exists()
        (header, tensors), (new_header, new_tensors) = packed.read(source), packed.read(out)
        assert new_header["dtypes"] == header["dtypes"]
        assert new_header["pattern"] == header["pattern"]
        before, after = packed.dense(header, tensors), packed.dense(new_header, new_tensors)
        for name, value in tensors.items():
            if name.endswith(".mask"):
                assert torch.equal(new_tensors[name], value)
            assert new_tensors[name].dtype == value.dtype
        masks, found = packed.masks_of(header, tensors), packed.masks_of(new_header, new_tensors)
    assert masks.keys() == found.keys()
    assert all(torch.equal(masks[name], found[name]) for name in masks)
    assert all(not after[name][~mask].any() for name, mask in found.items())
    assert before.keys() == after.keys()
    assert all(after[name].dtype == before[name].dtype for name in before)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    source_bytes = sum(f.stat().st_size for f in source.glob("*.safetensors"))
    assert abs(report.file_bytes - source_bytes) < 64
    model, tokenizer = modicum.load(out)
    assert modicum.generate(model, tokenizer, "Once", budget=40, max_new_tokens=3).tokens
    # A distilled student can be a student again.
    assert Student.load(out, "cpu").sparsity == report.sparsity == pytest.approx(0.6, abs=0.02)


def test_removed_weights_stay_zero_at_every_step(students: Path, tmp_path: Path) -> None:
    student = Student.load(students / "packed", "cpu")
    ids, targets = recorded(student, tmp_path)
    signs = []

    def look(*_: int) -> None:
        signs.extend(
            bool(parameter[is_removed].view(torch.int32).any()) for parameter, is_removed in student.removed()
        )

    train(student, ids, targets, FEW.training, progress=look)
    assert len(signs) == (4 + 1) * len(student.masks)
    assert not any(signs)  # not even -0.0


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
def test_an_answers_tokens_count_once_more_by_their_weight(
    weight: float, students: Path, tmp_path: Path
) -> None:
    student = Student.load(students / "packed", "cpu")
    ids, targets = recorded(student, tmp_path)
    with torch.no_grad():
        logits = student.model(ids).logits.double()
    answers = torch.tensor([0, 3, 1, 0, 0, 5])
    expected = []
    for row in range(6):
        essence = targets.read(row * 23, (row + 1) * 23)
        told = []
        for at in range(23):
            kept = zip(essence.classes[at].tolist(), essence.probabilities[at].tolist(), strict=True)
            target = {c: p for c, p in kept if p}
            rest = 1 - math.fsum(target.values())
            label = int(ids[row, at + 1])
            told.append(reference.loss(logits[row, at].tolist(), target, rest, label, 0.25, 1.0))
        expected.append(math.fsum(told) / 23)
        if answers[row]:
            expected[-1] += weight * math.fsum(told[-int(answers[row]) :]) / int(answers[row])
    settings = TrainingSettings(batch=6, answer_weight=weight)
    (found,) = train(student, ids, targets, settings, answers=answers)
    # Each loss is a sum over all classes in float32.
    bound = 2.0**-24 * (logits.shape[-1] + 6 * 23) * max(expected)
    assert abs(found - math.fsum(expected) / 6) <= bound


def recorded(student: Student, folder: Path, rule: str = "topk=8") -> tuple[Tensor, SparseTargets]:
    """Targets of the tiny model for a few sequences."""
    teacher, tokenizer = modicum.load(TINY_MODEL, dtype="float32", device="cpu")
    ids = torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"][: 6 * 24]).view(6, 24)
    header = TargetsHeader(VOCAB_SIZE, rule)
    with TargetsWriter(folder / "targets", header, 30) as writer:
        record(Ensemble.of([lambda x: teacher(x).logits[:, :-1]]), ids, writer)
    return ids, SparseTargets(folder / "targets")


def test_recorded_targets_are_the_teachers_probabilities(students: Path, tmp_path: Path) -> None:
    ids, targets = recorded(Student.load(students / "packed", "cpu"), tmp_path, f"topk={VOCAB_SIZE}")
    teacher, _ = modicum.load(TINY_MODEL, dtype="float32", device="cpu")
    for row in range(len(ids)):
        with torch.no_grad():
            expected = teacher(ids[row : row + 1]).logits[0, :-1].softmax(-1)
        essence = targets.read(23 * row, 23 * (row + 1))
        found = torch.zeros_like(expected).scatter(1, essence.classes, essence.probabilities)
        error = expected.double().sqrt() / 65535 + 1 / (4 * 65535**2) + gamma(2, torch.float32) * expected
        assert ((found - expected).double().abs() <= error).all()


class Stopped(KeyboardInterrupt):
    """As Ctrl-C."""


def stop_at(stage: str, number: int) -> Callable[[str, int, int], None]:
    def tell(what: str, done: int, _: int) -> None:
        if what == stage and done >= number:
            raise Stopped

    return tell


@pytest.mark.parametrize("save_every", [1, 100])
def test_a_stopped_run_goes_on_and_ends_as_if_it_had_not_been(
    save_every: int, students: Path, tmp_path: Path
) -> None:
    settings = replace(FEW, training=replace(FEW.training, save_every=save_every))
    arguments = (students / "packed", [str(TINY_MODEL)], [TEXT])
    whole = distill(*arguments, tmp_path / "whole", settings)
    out = tmp_path / "out"
    for stage, number in (("recording", 2), ("recording", 6), ("training", 1), ("training", 3)):
        with pytest.raises(Stopped):
            distill(*arguments, out, settings, progress=stop_at(stage, number))
        assert sorted(path.name for path in out.iterdir()) == ["state"]
    seen: list[tuple[str, int]] = []
    again = distill(*arguments, out, settings, progress=lambda what, done, _: seen.append((what, done)))
    assert seen == [("recording", 6), ("training", 3), ("training", 4)]
    assert again.losses == whole.losses
    (_, expected), (_, found) = packed.read(tmp_path / "whole"), packed.read(out)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_an_interrupt_within_a_step_leaves_the_checkpoint_before_it(
    students: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = Student.load(students / "packed", "cpu")
    ids, targets = recorded(student, tmp_path)
    checkpoint = TrainingCheckpoint(tmp_path / "training.safetensors", "some")
    calm = torch.optim.Adam.step
    calls = 0

    def step(self: torch.optim.Adam) -> None:
        nonlocal calls
        calls += 1
        calm(self)
        if calls == 3:  # the weights of step 3 are there, and it is not counted yet
            raise Stopped

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    with pytest.raises(Stopped):
        train(student, ids, targets, FEW.training, checkpoint=checkpoint)
    monkeypatch.undo()
    again = Student.load(students / "packed", "cpu")
    losses = train(again, ids, targets, FEW.training, checkpoint=checkpoint)
    plain = Student.load(students / "packed", "cpu")
    assert losses == train(plain, ids, targets, FEW.training)
    pairs = zip(again.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_several_teachers_and_kept_targets(students: Path, tmp_path: Path) -> None:
    settings = replace(FEW, targets=tmp_path / "targets", temperature=2.0)
    teachers = [str(TINY_MODEL), str(students / "dense")]
    distill(students / "packed", teachers, [TEXT], tmp_path / "first", settings)
    targets = SparseTargets(tmp_path / "targets")
    assert targets.header.about["teacher"].count("+") == 1
    seen: list[str] = []
    distill(
        students / "dense",
        teachers,
        [TEXT],
        tmp_path / "second",
        settings,
        progress=lambda what, done, total: seen.append(f"{what} {done}/{total}"),
    )
    assert seen[0] == "recording 6/6"  # nothing was recorded again
    with pytest.raises(TargetsError, match="holds targets with another teacher"):
        distill(students / "packed", teachers[:1], [TEXT], tmp_path / "third", settings)
    with pytest.raises(TargetsError, match="holds targets with another text"):
        distill(students / "packed", teachers, [TEXT[500:]], tmp_path / "third", settings)
    with pytest.raises(TargetsError, match=r"another temperature, 2\.0 and not 1\.0"):
        distill(students / "packed", teachers, [TEXT], tmp_path / "third", replace(settings, temperature=1.0))


def test_a_state_of_other_settings_is_refused(students: Path, tmp_path: Path) -> None:
    arguments = (students / "packed", [str(TINY_MODEL)], [TEXT], tmp_path / "out")
    with pytest.raises(Stopped):
        distill(*arguments, FEW, progress=stop_at("training", 2))
    other = replace(FEW, training=replace(FEW.training, learning_rate=1e-4))
    with pytest.raises(InputError, match="is of a training with another student, other targets or settings"):
        distill(*arguments, other)
    distill(*arguments, FEW)
    with pytest.raises(InputError, match="is not empty"):
        distill(*arguments, FEW)


def with_another_norm(source: Path, folder: Path) -> Path:
    """A dense model whose matrices are those of another and whose last norm is not."""
    model, tokenizer = modicum.load(source, device="cpu")
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[-1] *= 2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_no_weight_of_a_teacher_or_student_may_be_another(students: Path, tmp_path: Path) -> None:
    teacher, student, out = str(TINY_MODEL), students / "dense", tmp_path / "out"
    settings = replace(FEW, targets=tmp_path / "targets")
    with pytest.raises(Stopped):
        distill(student, [teacher], [TEXT], out, settings, progress=stop_at("training", 2))
    other_teacher = with_another_norm(TINY_MODEL, tmp_path / "teacher")
    with pytest.raises(TargetsError, match="holds targets with another teacher"):
        distill(student, [str(other_teacher)], [TEXT], tmp_path / "other", settings)
    other_student = with_another_norm(student, tmp_path / "student")
    with pytest.raises(InputError, match="is of a training with another student"):
        distill(other_student, [teacher], [TEXT], out, settings)
    assert len(distill(student, [teacher], [TEXT], out, settings).losses) == 4


def test_targets_may_not_lie_among_the_files_of_the_student(students: Path, tmp_path: Path) -> None:
    """They would be in the way of the student when it is written, after all the training."""
    out = tmp_path / "out"
    for place in (out, out / "targets", out / "state" / ".." / "targets"):
        settings = replace(FEW, targets=place)
        with pytest.raises(
            InputError, match=r"of the targets is in .*out, which gets the model: give another"
        ):
            distill(tmp_path / "none", ["none"], [TEXT], out, settings)  # before anything is loaded
    assert not out.exists()
    distill(
        students / "packed", [str(TINY_MODEL)], [TEXT], out, replace(FEW, targets=out / "state" / "targets")
    )
    assert not (out / "state").exists()


def test_questions_are_mixed_in(tmp_path: Path) -> None:
    settings = replace(
        FEW,
        tasks="niah_single_2:max_new_tokens=24,vt:hops=1,shots=0,max_new_tokens=24",
        length=256,
        sequences=4,
        keep="mass=0.5",
        training=TrainingSettings(epochs=1),
    )
    report = distill("reference", ["reference"], [modicum.sample_text()], tmp_path / "out", settings)
    assert (report.num_questions, report.num_sequences, report.format) == (2, 4, "dense")
    assert 0.5 <= report.targets.least_mass <= report.targets.captured_mass < 1
    with pytest.raises(InputError, match="the share of questions is 2"):
        distill("reference", ["reference"], [TEXT], tmp_path / "other", replace(settings, task_share=2))


def test_questions_are_followed_by_the_teachers_own_answers() -> None:
    model, tokenizer = modicum.load("reference", dtype="float32", device="cpu")
    ids = torch.zeros(4, 256, dtype=torch.int64)
    questions = Questions("niah_single_2:max_new_tokens=12", 0.5, 3)
    teachers = open_teachers(["reference"], tokenizer, ids, device="cpu")
    seen: list[tuple[int, int]] = []
    found = with_questions(ids, tokenizer, questions, teachers.answer, lambda *done: seen.append(done))
    assert seen == [(0, 2), (2, 2)]
    asked = [row for row in found.ids if row.any()]
    assert len(asked) == 2
    assert found.answers.tolist() == [12 * bool(row.any()) for row in found.ids]
    for row in asked:
        start = int((row == tokenizer.bos_token_id).nonzero()[-1])  # of the prompt: zeros are in front
        with torch.no_grad():
            logits = model(row[None, start:]).logits[0, :-1]
        chosen = logits.gather(1, row[start + 1 :, None])[-12:, 0]
        # The best token each time, or one as near to it as rounding brings it.
        assert (logits.max(-1).values[-12:] - chosen <= 2 * logits_bound(model, logits)).all()
    assert torch.equal(found.ids, with_questions(ids, tokenizer, questions, teachers.answer).ids)
    other = with_questions(ids, tokenizer, replace(questions, seed=4), teachers.answer)
    assert not torch.equal(found.ids, other.ids)


def other_vocabulary(folder: Path) -> Path:
    """The tiny model's tokenizer less two tokens, with a model of as many."""
    _, tokenizer = modicum.load(TINY_MODEL)
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    names = {index: token for token, index in told["model"]["vocab"].items()}
    told["model"]["vocab"][names[400]], told["model"]["vocab"][names[401]] = 401, 400
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(told))
    return folder


def wide_student(folder: Path) -> Path:
    """A student with the tiny model's tokenizer and logits for 8 tokens more."""
    _, tokenizer = modicum.load(TINY_MODEL)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE + 8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_models_that_do_not_fit(students: Path, tmp_path: Path) -> None:
    teacher, student = str(TINY_MODEL), students / "packed"
    swapped, wide = other_vocabulary(tmp_path / "swapped"), wide_student(tmp_path / "wide")
    out = tmp_path / "out"
    with pytest.raises(
        ModelError, match=r"2 of them differ, such as .*: give a teacher with the student's tokenizer"
    ):
        distill(student, [teacher, str(swapped)], [TEXT], out, FEW)
    with pytest.raises(ModelError, match="has 2,048 tokens and the student 512"):
        distill(student, ["reference"], [TEXT], out, FEW)
    with pytest.raises(ModelError, match="gives logits for 512 tokens, the student for 520"):
        distill(wide, [teacher], [TEXT], out, FEW)
    with pytest.raises(
        ModelError, match=r"teacher .* gives logits for 512 tokens, .* for 520: give teachers of one"
    ):
        distill(student, [teacher, str(wide)], [TEXT], out, FEW)
    with pytest.raises(InputError, match="topk=513 keeps more classes than the 512"):
        distill(student, [teacher], [TEXT], out, replace(FEW, keep="topk=513"))
    with pytest.raises(InputError, match="there is no teacher"):
        distill(student, [], [TEXT], out, FEW)
    with pytest.raises(InputError, match="length is 600, and the student takes 2 to 512"):
        distill(student, [teacher], [TEXT], out, replace(FEW, length=600))
    with pytest.raises(InputError, match="give more text"):
        distill(student, [teacher], [TEXT], out, replace(FEW, sequences=10_000))
    with pytest.raises(InputError, match="give text for two at least, or shorter ones, length=128"):
        distill(student, [teacher], ["Too short"], out, replace(FEW, sequences=None, length=256))
    assert not out.exists()


def test_a_loss_that_is_no_number_is_an_error_that_a_lower_rate_mends(students: Path, tmp_path: Path) -> None:
    arguments = (students / "packed", [str(TINY_MODEL)], [TEXT], tmp_path / "out")
    training = replace(FEW.training, learning_rate=1e30, epochs=20)
    with pytest.raises(ModelError, match="give a lower learning rate than 1e"):
        distill(*arguments, replace(FEW, training=training))
    assert len(distill(*arguments, FEW).losses) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1"),
        ({"learning_rate": 1e31}, "learning_rate is 1e.31: give a number above 0 and at most 1e.30"),
        ({"seed": -1}, "seed is -1: give a whole number from 0 to"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"hard_weight": 1.5}, "hard_weight is 1.5"),
        ({"tail": "some"}, "tail is 'some'"),
        ({"warmup": 2.0}, "warmup is 2"),
        ({"answer_weight": -1.0}, "answer_weight is -1"),
        ({"answer_weight": math.nan}, "answer_weight is nan"),
    ],
)
def test_bad_settings(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainingSettings(**change)  # type: ignore[arg-type]


@given(num=st.integers(1, 40), batch=st.integers(1, 12), epochs=st.integers(1, 3), seed=st.integers(0, 99))
def test_an_epoch_has_each_sequence_once_and_rates_rise_and_fall(
    num: int, batch: int, epochs: int, seed: int
) -> None:
    settings = TrainingSettings(epochs=epochs, batch=batch, seed=seed, learning_rate=0.5)
    total = settings.num_steps(num)
    rows = [settings.rows(step, num).tolist() for step in range(total)]
    steps = total // epochs
    for epoch in range(epochs):
        of_epoch = [row for some in rows[epoch * steps : (epoch + 1) * steps] for row in some]
        assert sorted(of_epoch) == list(range(num))
    rates = [settings.rate(step, total) for step in range(total)]
    assert max(rates) == 0.5
    top = rates.index(0.5)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0


def test_a_kept_weight_of_a_dense_student_does_not_become_zero(students: Path, tmp_path: Path) -> None:
    student = Student.load(students / "dense", "cpu")
    name, mask = next(iter(student.masks.items()))
    weight = dict(student.model.named_parameters())[name]
    at = tuple(mask.nonzero()[0].tolist())
    with torch.no_grad():
        weight[at] = 0.0
    student.save(tmp_path / "out", {})
    assert torch.equal(zeros(tmp_path / "out")[name], mask)
    with torch.no_grad():
        weight[~mask] = 1.0
    with pytest.raises(ModelError, match="a removed weight is not 0"):
        student.save(tmp_path / "other", {})


def command(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["distill", *words])
    return done.exit_code, done.stdout, done.stderr


def test_the_command(students: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(TEXT)
    words = [
        "--teacher",
        str(TINY_MODEL),
        "--student",
        str(students / "packed"),
        "--text",
        str(tmp_path / "text"),
    ]
    words += ["--sequences", "6", "--length", "24", "--epochs", "1"]
    code, out, err = command(*words, "--keep", "topk=4", "--out", str(tmp_path / "one"), "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["targets"]["kept_classes"] == 4
    assert told["steps"] == 1
    assert told["format"] == "packed"
    code, out, err = command(*words, "--keep", "mass=0.5", "--tail", "bin", "--out", str(tmp_path / "two"))
    assert code == 0, err
    assert "of the probability" in out.replace("\n", " ")
    assert "perplexity of held-back text" in out
    assert f"use it as --model {tmp_path / 'two'}" in err


def test_ctrl_c_leaves_the_recording_and_a_checkpoint(students: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    words = [sys.executable, "-m", "modicum", "distill", "--teacher", str(TINY_MODEL)]
    words += ["--student", str(students / "packed"), "--text", str(tmp_path / "text.txt"), "--device", "cpu"]
    words += ["--sequences", "4", "--length", "8", "--epochs", "100000", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    state = tmp_path / "out" / "state"
    until = time.monotonic() + 120
    while not (state / "training.safetensors").exists():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err.strip().endswith("interrupted")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["state"]
    assert len(SparseTargets(state / "targets")) == 4 * 7
    with safe_open(state / "training.safetensors", framework="pt") as file:
        told = json.loads(file.metadata()["modicum"])
    assert told["step"] == len(told["losses"]) >= 100


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep", "topk=0"], "k is 0"),
        (["--keep", "topk=600"], "give k of at most 512"),
        (["--tail", "some"], "tail is 'some'; choose one of renormalize"),
        (["--text", "nowhere"], "there is no nowhere to learn from"),
        (["--hard-weight", "3"], "hard_weight is 3"),
        (["--bits", "4"], "give 8 or 16"),
        (["--teacher", ","], "there is no teacher"),
        (["--teacher", "nobody"], "there is no model 'nobody'"),
        (["--student", "nobody"], "there is no model 'nobody'"),
        (["--tasks", "nonsense"], "nonsense"),
        (["--tasks", "text"], "text asks no questions"),
        (["--tasks", "vt", "--task-share", "0"], "the share of questions is 0"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, students: Path, tmp_path: Path) -> None:
    given = ["--teacher", str(TINY_MODEL), "--student", str(students / "packed"), "--length", "24"]
    code, _, err = command(*given, "--sequences", "4", "--out", str(tmp_path / "out"), *words)
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
