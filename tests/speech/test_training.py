"""Training: that it learns, goes on after a stop, and refuses targets that are not its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from modicum.distill import CTCBatch, CTCFrames, SparseTargets, ctc_essence_loss
from modicum.errors import InputError, ModelError, TargetsError
from modicum.speech import (
    ConvCtcSettings,
    CorpusSettings,
    FrameModelSettings,
    Recipe,
    Recognizer,
    TeachingSettings,
    TokenSet,
    TrainSettings,
    build_corpus,
    evaluate,
    record_targets,
    train,
    train_recognizer,
    write_manifest,
)
from modicum.speech.examples import Examples, FrameRate, collate
from modicum.speech.teaching import check_alike
from modicum.speech.training_loss import batch_loss, padded_target
from tests.bounds import FUNCTION, gamma
from tests.speech.conftest import MODELS, QUICK, TOKENS, Stop, Tones

KEEP = TeachingSettings("topk=3", bits=16)


@pytest.mark.parametrize("model", sorted(MODELS))
def test_a_model_learns_and_recognises_what_it_has_not_heard(model: str, tones: Tones) -> None:
    recipe = replace(QUICK, model=MODELS[model], epochs=40, spec_augment=model == "conv")
    result = train(recipe, tones.corpus, tones.tokens(model))
    assert sum(result.losses[-5:]) < sum(result.losses[:5]) / 4
    found = evaluate([result.recognizer], tones.test)
    if model == "frames":
        assert found.frame_accuracy is not None
        assert found.frame_accuracy.value > 0.8
    else:
        assert found.character_error_rate is not None
        assert found.character_error_rate.value < 0.2


def parameters_of(recognizer: Recognizer) -> dict[str, Tensor]:
    return dict(recognizer.model.state_dict())


@pytest.mark.parametrize("stops", [[4], [1, 5, 6]])
@pytest.mark.parametrize("model", ["conv", "frames"])
def test_a_stopped_training_ends_as_if_it_had_not_been(
    model: str, stops: list[int], tones: Tones, tmp_path: Path, stop_at: Stop
) -> None:
    dropping = {
        "conv": ConvCtcSettings(width=8, num_blocks=1, kernel=3, dropout=0.2),
        "frames": FrameModelSettings(width=8, num_layers=2, context=1, dropout=0.2),
    }
    recipe = replace(QUICK, model=dropping[model], spec_augment=True)
    tokens = tones.tokens(model)
    expected = train(recipe, tones.corpus, tokens)
    assert len(expected.losses) > max(stops)
    for step in stops:
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tones.corpus, tokens, out=tmp_path / "out", progress=stop_at(step))
    result = train(recipe, tones.corpus, tokens, out=tmp_path / "out")
    assert result.losses == expected.losses
    for name, tensor in parameters_of(expected.recognizer).items():
        assert torch.equal(tensor, parameters_of(result.recognizer)[name]), name
    assert not (tmp_path / "out" / "state").exists()


def test_ctrl_c_within_a_step_keeps_the_steps_before(
    tones: Tones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(QUICK, save_every=100)
    expected = train(recipe, tones.corpus, TOKENS)
    from modicum.speech import training

    steps = 0

    def interrupted(*given: object) -> Tensor:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt
        return batch_loss(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(training, "batch_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tones.corpus, TOKENS, out=tmp_path / "out")
    done: list[int] = []
    result = train(
        recipe, tones.corpus, TOKENS, out=tmp_path / "out", progress=lambda _, step, total: done.append(step)
    )
    assert done[0] == 2
    for name, tensor in parameters_of(expected.recognizer).items():
        assert torch.equal(tensor, parameters_of(result.recognizer)[name]), name


def test_a_checkpoint_of_another_training_is_refused(tones: Tones, tmp_path: Path, stop_at: Stop) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(QUICK, tones.corpus, TOKENS, out=tmp_path / "out", progress=stop_at(4))
    for recipe in (replace(QUICK, seed=1), replace(QUICK, model=MODELS["dfsmn"])):
        with pytest.raises(InputError, match="is of a training with another student"):
            train(recipe, tones.corpus, TOKENS, out=tmp_path / "out")


def test_seeds_differ_and_repeat(tones: Tones) -> None:
    first, again, other = (
        train(replace(QUICK, epochs=1, seed=seed), tones.corpus, TOKENS).recognizer.digest
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_a_training_leaves_the_global_generator_alone(tones: Tones) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(replace(QUICK, epochs=1), tones.corpus, TOKENS)
    assert torch.equal(torch.rand(3), expected)


def test_a_loss_that_is_no_number_says_what_to_do(tones: Tones, tmp_path: Path) -> None:
    wild = replace(QUICK, model=MODELS["dfsmn"], learning_rate=1e20, warmup=0.0)
    with pytest.raises(ModelError, match="give a lower learning rate than 1e"):
        train(wild, tones.corpus, TOKENS, out=tmp_path / "out")
    assert not (tmp_path / "out" / "state" / "training.safetensors").exists()


def test_targets_are_the_mean_of_the_members_probabilities(
    tones: Tones, members: dict[str, Recognizer], tmp_path: Path
) -> None:
    teachers = [members["conv"], members["dfsmn"]]
    settings = TeachingSettings(f"topk={TOKENS.num_classes}", bits=16)
    targets = record_targets(teachers, tones.corpus, tmp_path / "t", settings)
    examples = Examples(tones.corpus, TOKENS, FrameRate("ctc", 2))
    assert len(targets) == examples.num_frames
    for row in (0, 7, len(tones.corpus) - 1):
        essence = targets.read(*examples.span(row))
        logits = [teacher.logits(tones.corpus.features(row)) for teacher in teachers]
        mean = sum(one.double().softmax(-1) for one in logits) / 2
        assert isinstance(mean, Tensor)
        found = torch.zeros_like(mean).scatter_(1, essence.classes, essence.probabilities.double())
        coded = mean.sqrt() / 65_535 + 1 / (4 * 65_535**2)
        bound = coded + gamma(4 * FUNCTION + TOKENS.num_classes, torch.float32) * (1 + mean)
        assert bool(((found - mean).abs() <= bound).all())


def test_a_stopped_recording_goes_on(tones: Tones, members: dict[str, Recognizer], tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_targets([members["conv"]], tones.corpus, tmp_path / "t", KEEP, progress=stop)
    with pytest.raises(TargetsError, match="is not complete"):
        SparseTargets(tmp_path / "t")
    found = record_targets([members["conv"]], tones.corpus, tmp_path / "t", KEEP)
    expected = record_targets([members["conv"]], tones.corpus, tmp_path / "u", KEEP)
    assert len(found) == len(expected)
    a, b = found.read(0, len(found)), expected.read(0, len(expected))
    assert torch.equal(a.classes, b.classes)
    assert torch.equal(a.probabilities, b.probabilities)


@pytest.mark.parametrize("tail", ["renormalize", "drop", "bin"])
def test_frame_losses_are_their_formula(
    tail: str, tones: Tones, members: dict[str, Recognizer], tmp_path: Path
) -> None:
    """λ · CE(label) + (1 - λ) · τ² · CE(q, softmax(z / τ)), in plain loops, for a batch with padding."""
    rule = TeachingSettings("mass=0.8", bits=16, temperature=2.0)
    targets = record_targets([members["frames"]], tones.corpus, tmp_path / "t", rule)
    examples = Examples(tones.corpus, tones.thirds, FrameRate("frames", 1))
    recipe = Recipe(model=MODELS["frames"], hard_weight=0.3, tail=tail)  # type: ignore[arg-type]
    rows = [3, 0, 5]
    batch = collate(examples, rows, [tones.corpus.features(row) for row in rows])
    logits = torch.randn(3, batch.features.shape[1], tones.thirds.num_classes, dtype=torch.float64)
    found = float(batch_loss(logits, batch, examples, recipe, targets))
    terms, largest = [], 0.0
    for place, row in enumerate(rows):
        target = targets.read(*examples.span(row)).target(tail)  # type: ignore[arg-type]
        for frame, label in enumerate(examples.labels(row).tolist()):
            z = logits[place, frame].tolist()
            cool = [value / 2 for value in z]
            lse, cool_lse = (math.log(math.fsum(map(math.exp, values))) for values in (z, cool))
            classes, q = target.classes[frame].tolist(), target.probabilities[frame].tolist()
            soft = math.fsum(p * (cool_lse - cool[k]) for k, p in zip(classes, q, strict=True))
            if target.tail is not None:
                rest = [value for k, value in enumerate(cool) if k not in classes]
                soft += float(target.tail[frame]) * (cool_lse - math.log(math.fsum(map(math.exp, rest))))
            terms.append(0.3 * (lse - z[label]) + 0.7 * 4 * soft)
            largest = max(largest, *map(abs, z), terms[-1])
    expected = math.fsum(terms) / len(terms)
    operations = len(terms) + 20 * FUNCTION + 4 * tones.thirds.num_classes
    # Targets and loss weights are float32, what is made of them float64.
    assert abs(found - expected) <= gamma(operations, torch.float64) * 8 * (1 + largest)


def test_ctc_losses_are_those_of_the_utterances_alone(
    tones: Tones, members: dict[str, Recognizer], tmp_path: Path
) -> None:
    targets = record_targets([members["conv"]], tones.corpus, tmp_path / "t", TeachingSettings("mass=0.9"))
    examples = Examples(tones.corpus, TOKENS, FrameRate("ctc", 2))
    rows = [3, 0, 5]
    batch = collate(examples, rows, [tones.corpus.features(row) for row in rows])
    size = examples.rate.num_frames(batch.features.shape[1])
    logits = torch.randn(3, size, TOKENS.num_classes, dtype=torch.float64)

    def alone(place: int, hard_weight: float) -> float:
        start, end = examples.span(rows[place])
        labels = examples.labels(rows[place])
        one = CTCBatch(torch.tensor([end - start]), labels[None], torch.tensor([len(labels)]))
        target = targets.read(start, end).target("renormalize")
        frames = CTCFrames(0, 1)
        given = logits[place : place + 1, : end - start]
        return float(ctc_essence_loss(given, target, one, frames=frames, hard_weight=hard_weight))

    def together(hard_weight: float, given: SparseTargets | None) -> float:
        recipe = Recipe(model=MODELS["conv"], hard_weight=hard_weight)
        return float(batch_loss(logits, batch, examples, recipe, given))

    bound = gamma(50 * size * FUNCTION, torch.float64) * (1 + float(logits.abs().max())) * size
    # The hard part is the mean over utterances, the soft part over the selected frames of all.
    hard = math.fsum(alone(place, 1.0) for place in range(3)) / 3
    assert abs(together(1.0, targets) - hard) <= bound
    assert together(1.0, targets) == together(0.5, None)
    counts = []
    for row in rows:
        start, end = examples.span(row)
        best = targets.read(start, end).classes[:, 0][None]
        counts.append(int(CTCFrames(0, 1).select(best, torch.tensor([end - start])).sum()))
    soft = math.fsum(n * alone(place, 0.0) for place, n in enumerate(counts)) / sum(counts)
    assert abs(together(0.0, targets) - soft) <= bound


def test_padded_targets_are_the_utterances_own(
    tones: Tones, members: dict[str, Recognizer], tmp_path: Path
) -> None:
    targets = record_targets([members["conv"]], tones.corpus, tmp_path / "t", TeachingSettings("mass=0.9"))
    spans, size = [(3, 9), (0, 3), (20, 28)], 8
    for tail in ("renormalize", "drop", "bin"):
        padded = padded_target(targets, spans, size, tail)  # type: ignore[arg-type]
        for place, (start, end) in enumerate(spans):
            own = targets.read(start, end).target(tail)  # type: ignore[arg-type]
            here = slice(place * size, place * size + end - start)
            width = own.classes.shape[1]
            assert torch.equal(padded.classes[here, :width], own.classes)
            assert bool((padded.classes[here, width:] == own.classes[:, :1]).all())
            assert torch.equal(padded.probabilities[here, :width], own.probabilities)
            assert not padded.probabilities[here, width:].any()
            assert not padded.probabilities[place * size + end - start : (place + 1) * size].any()
            if padded.tail is not None and own.tail is not None:
                assert torch.equal(padded.tail[here], own.tail)


@pytest.mark.parametrize("model", ["conv", "frames"])
def test_a_student_learns_from_targets_alone(model: str, tones: Tones, tmp_path: Path) -> None:
    recipe = replace(QUICK, model=MODELS[model], epochs=20)
    teacher = train(recipe, tones.corpus, tones.tokens(model)).recognizer
    targets = record_targets([teacher], tones.corpus, tmp_path / "t", KEEP)
    student = train(
        replace(recipe, hard_weight=0.0, seed=1), tones.corpus, tones.tokens(model), targets=targets
    )
    assert student.losses[-1] < student.losses[0] / 2
    labels = student.recognizer.about["targets"]
    assert labels["teacher"] == teacher.digest
    agreeing = total = 0
    for row in range(len(tones.test)):
        features = tones.test.features(row)
        ours, theirs = (one.logits(features).argmax(-1) for one in (student.recognizer, teacher))
        agreeing, total = agreeing + int((ours == theirs).sum()), total + len(ours)
    assert agreeing / total > 0.7


@pytest.fixture
def recorded(tones: Tones, members: dict[str, Recognizer], tmp_path: Path) -> SparseTargets:
    return record_targets([members["conv"]], tones.corpus, tmp_path / "recorded", KEEP)


def test_targets_of_other_data_are_refused(tones: Tones, recorded: SparseTargets) -> None:
    with pytest.raises(TargetsError, match=r"holds targets with another data, \w{16} and not \w{16}"):
        train(QUICK, tones.test, TOKENS, targets=recorded)


def test_targets_of_another_token_set_are_refused(tones: Tones, recorded: SparseTargets) -> None:
    other = TokenSet("graphemes", ("b", "a", "c"))
    with pytest.raises(TargetsError, match="holds targets with another token set"):
        train(QUICK, tones.corpus, other, targets=recorded)


def test_targets_of_another_frame_rate_are_refused(tones: Tones, recorded: SparseTargets) -> None:
    recipe = replace(QUICK, model=ConvCtcSettings(subsampling=3))
    with pytest.raises(TargetsError, match=r"another frame rate, 50 per second and not 33\.3333 per second"):
        train(recipe, tones.corpus, TOKENS, targets=recorded)


@pytest.mark.parametrize(
    ("other", "what"),
    [("dfsmn", "teacher"), ("keep", "rule of what is kept"), ("temperature", "temperature")],
)
def test_a_folder_of_another_recording_is_refused(
    other: str, what: str, tones: Tones, members: dict[str, Recognizer], recorded: SparseTargets
) -> None:
    settings = {"keep": replace(KEEP, keep="topk=2"), "temperature": replace(KEEP, temperature=2.0)}
    teacher = members.get(other, members["conv"])
    with pytest.raises(TargetsError, match=f"holds targets with another {what}"):
        record_targets([teacher], tones.corpus, recorded.folder, settings.get(other, KEEP))


def test_k_over_the_classes_is_refused(tones: Tones, members: dict[str, Recognizer], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="topk=5 keeps more classes than the 4 there are"):
        record_targets([members["conv"]], tones.corpus, tmp_path / "t", TeachingSettings("topk=5"))
    assert not (tmp_path / "t").exists()


def other_member(members: dict[str, Recognizer], what: str) -> Recognizer:
    first = members["conv"]
    if what == "token sets":
        return replace(first, tokens=TokenSet("graphemes", ("b", "a", "c")))
    if what == "features":
        return replace(first, features=replace(first.features, num_mels=20))
    slow = ConvCtcSettings(subsampling=4, width=4, num_blocks=1).build(40, TOKENS.num_classes)
    return replace(first, model=slow.eval())


def test_the_order_of_teachers_makes_no_difference(
    tones: Tones, members: dict[str, Recognizer], tmp_path: Path
) -> None:
    three = [
        members["conv"],
        members["dfsmn"],
        replace(members["conv"], model=MODELS["conv"].build(40, TOKENS.num_classes).eval()),
    ]
    files = []
    for name, teachers in (("a", three), ("b", three[::-1])):
        record_targets(teachers, tones.test, tmp_path / name, KEEP)
        files.append({x.name: x.read_bytes() for x in (tmp_path / name).iterdir()})
    assert files[0] == files[1]
    record_targets([three[1], three[2], three[0]], tones.test, tmp_path / "a", KEEP)


@pytest.mark.parametrize("what", ["token sets", "features", "frame rates"])
def test_members_that_differ_are_refused(
    what: str, tones: Tones, members: dict[str, Recognizer], tmp_path: Path
) -> None:
    both = [members["conv"], other_member(members, what)]
    for call in (
        lambda: record_targets(both, tones.corpus, tmp_path / "t", KEEP),
        lambda: evaluate(both, tones.test),
        lambda: check_alike(both),
    ):
        with pytest.raises(ModelError, match=f"different {what}"):
            call()


def test_a_corpus_of_other_features_is_refused(
    tones: Tones, members: dict[str, Recognizer], tmp_path: Path
) -> None:
    teacher = other_member(members, "features")
    with pytest.raises(ModelError, match="read other features"):
        record_targets([teacher], tones.corpus, tmp_path / "t", KEEP)
    with pytest.raises(InputError, match="there is no teacher"):
        record_targets([], tones.corpus, tmp_path / "t", KEEP)


def test_a_student_of_another_frame_rate_is_refused_before_recording(
    tones: Tones, members: dict[str, Recognizer], tmp_path: Path
) -> None:
    members["conv"].save(tmp_path / "teacher")
    settings = TrainSettings(replace(QUICK, model=ConvCtcSettings(subsampling=3)))
    with pytest.raises(
        ModelError, match=r"has a frame rate of 50 per second, the student of 33\.3333 per.*subsampling 2"
    ):
        train_recognizer(tones.folder, tmp_path / "out", settings, [tmp_path / "teacher"])
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_said(
    tones: Tones, members: dict[str, Recognizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modicum.distill import writer

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_shard", full)
    with pytest.raises(TargetsError, match="No space left"):
        record_targets([members["conv"]], tones.corpus, tmp_path / "t", KEEP)
    with pytest.raises(TargetsError, match="is not complete"):
        SparseTargets(tmp_path / "t")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe(epochs=0), "epochs is 0"),
        (lambda: Recipe(batch_seconds=0), "batch_seconds is 0"),
        (lambda: Recipe(batch_seconds=1e307), "batch_seconds is 1e"),
        (lambda: Recipe(batch_seconds=math.nan), "batch_seconds is nan"),
        (lambda: Recipe(learning_rate=-1), "learning_rate is -1"),
        (lambda: Recipe(hard_weight=1.5), "hard_weight is 1.5"),
        (lambda: Recipe(tail="some"), "tail is 'some'"),
        (lambda: Recipe(neighbours=-1), "neighbours is -1"),
        (lambda: TeachingSettings(bits=4), "in 4 bits is not known"),
        (lambda: TeachingSettings(keep="best=3"), "keep is 'best=3'"),
        (lambda: TeachingSettings(temperature=0), "the temperature is 0"),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_the_output_is_what_was_trained(tones: Tones, tmp_path: Path) -> None:
    result = train(QUICK, tones.corpus, TOKENS, out=tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    state = parameters_of(result.recognizer)
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in state)
    with pytest.raises(InputError, match="is not empty"):
        train(QUICK, tones.corpus, TOKENS, out=tmp_path / "out")


def test_a_manifest_of_one_utterance_can_be_learned_from(tones: Tones, tmp_path: Path) -> None:
    corpus = build_corpus(tones.utterances[:1], tmp_path / "f")
    assert len(train(QUICK, corpus, TOKENS).losses) == QUICK.epochs


def test_an_utterance_counts_though_some_of_its_copies_are_left_out(tones: Tones, tmp_path: Path) -> None:
    # One output for two frames: the texts fit into the slow copies, and not into those at double speed.
    rows = [replace(tones.utterances[row], text="ab" * (tones.corpus.num_frames(row) // 6)) for row in (0, 1)]
    write_manifest(tmp_path / "m.jsonl", [*rows, tones.utterances[2]])
    settings = TrainSettings(QUICK, CorpusSettings(copies=3, speeds=(1.0, 2.0, 2.0)))
    with pytest.warns(UserWarning, match="4 of 9 utterances left out"):
        report = train_recognizer(tmp_path / "m.jsonl", tmp_path / "out", settings)
    assert report.num_utterances == report.result.num_utterances == 3
