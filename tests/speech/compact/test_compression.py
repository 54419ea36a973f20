"""Pruning, rounding, refining and the packed file."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from modicum.distill.checkpoint import TrainingCheckpoint
from modicum.errors import InputError, ModelError, TargetsError
from modicum.speech import Recipe, Recognizer, TeachingSettings, record_targets, train
from modicum.speech.acoustic_model import AcousticModel
from modicum.speech.compact.byte_count import file_nbytes, planned_sections, sections
from modicum.speech.compact.compressed import compress_weights, is_matrix
from modicum.speech.compact.compression import compress_recognizer
from modicum.speech.compact.packed_file import load_packed, packed_metadata, save_packed
from modicum.speech.compact.pruning import (
    PruningSettings,
    apply_masks,
    is_prunable,
    make_masks,
    num_kept,
)
from modicum.speech.compact.refining import RefiningRecipe, refine
from modicum.speech.compact.sanm import SanmSettings
from modicum.speech.examples import Examples, FrameRate, collate
from modicum.speech.training_loss import batch_loss
from tests.speech.conftest import TOKENS, Tones

SANM = SanmSettings(
    subsampling=2, width=32, num_layers=4, num_heads=2, hidden=48, kernel=7, sharing="cycle", num_sets=2
)
RECIPE = Recipe(model=SANM, epochs=12, batch_seconds=8, learning_rate=5e-3, spec_augment=False)
REFINING = RefiningRecipe(
    training=replace(RECIPE, epochs=5, learning_rate=2e-3, save_every=2),
    pruning=PruningSettings(sparsity=0.6, every=3),
)


@pytest.fixture(scope="module")
def shared(tones: Tones) -> Recognizer:
    return train(RECIPE, tones.corpus, TOKENS).recognizer


@given(
    sparsity=st.floats(0, 0.99), start=st.integers(0, 40), length=st.integers(0, 40), step=st.integers(0, 100)
)
def test_the_schedule_is_its_formula(sparsity: float, start: int, length: int, step: int) -> None:
    pruning = PruningSettings(sparsity, start=start / 100, end=(start + length) / 100)
    first, last = pruning.start * 100, pruning.end * 100
    if step < first:
        expected = 0.0
    elif step >= last:
        expected = sparsity
    else:
        expected = sparsity * (1 - (1 - (step - first) / (last - first)) ** 3)
    assert math.isclose(pruning.sparsity_at(step, 100), expected, rel_tol=1e-12, abs_tol=1e-15)
    assert pruning.sparsity_at(step, 100) <= pruning.sparsity_at(step + 1, 100) <= sparsity


@pytest.mark.parametrize("block", [1, 4])
@given(sparsity=st.floats(0, 0.95), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_a_mask_keeps_the_largest_blocks_of_each_matrix(block: int, sparsity: float, seed: int) -> None:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(34, 6), torch.nn.Linear(8, 3))
    pruning = PruningSettings(sparsity, block)
    masks = make_masks(model, sparsity, pruning)
    assert set(masks) == {"0.weight"}  # 8 inputs are too few
    weight, mask = model[0].weight.tolist(), masks["0.weight"].tolist()
    blocks = [(row, at) for row in range(6) for at in range(0, 34, block)]
    score = {(r, a): sum(abs(w) for w in weight[r][a : a + block]) for r, a in blocks}
    kept = [(r, a) for r, a in blocks if mask[r][a]]
    assert len(kept) == num_kept(len(blocks), sparsity) == max(1, len(blocks) - round(sparsity * len(blocks)))
    assert all(len(set(mask[r][a : a + block])) == 1 for r, a in blocks)
    dropped = [score[one] for one in blocks if one not in kept]
    assert min(score[one] for one in kept) >= max(dropped, default=0)


def test_a_global_score_is_summed_over_the_uses_of_a_matrix() -> None:
    settings = SanmSettings(
        width=32, num_layers=5, num_heads=1, hidden=32, sharing="cycle", num_sets=2, kernel=3
    )
    model = settings.build(4, 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("sets.0"):
                parameter.fill_(1.0)  # used 3 times: 3
            elif name.startswith("sets.1"):
                parameter.fill_(1.4)  # used twice: 2.8
            elif is_prunable(parameter):
                parameter.fill_(10.0)
    wanted = sum(x.numel() for x in model.sets[1].parameters())
    total = sum(x.numel() for x in model.parameters() if is_prunable(x))
    masks = make_masks(model, wanted / total, PruningSettings(0.5, scope="global"))
    for name, mask in masks.items():
        assert bool(mask.all()) != name.startswith("sets.1")
        assert bool(mask.any()) != name.startswith("sets.1")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.2, 0.7])
def test_a_loaded_file_gives_what_was_saved_bit_for_bit(
    shared: Recognizer, tones: Tones, tmp_path: Path, bits: int, block: int, sparsity: float
) -> None:
    model = copy.deepcopy(shared.model)
    if sparsity:
        apply_masks(model, make_masks(model, sparsity, PruningSettings(sparsity, block)))
    before = {name: x.clone() for name, x in model.named_parameters()}
    compact = compress_weights(Recognizer(model, shared.tokens, shared.features, {"a": "ü"}), bits, block)
    path = tmp_path / "model.safetensors"
    nbytes = save_packed(compact, path)

    # The counter, and the law in the docs, worked out here once more.
    assert nbytes == path.stat().st_size == file_nbytes(sections(compact), packed_metadata(compact))
    planned = planned_sections(model, bits, sparsity, block)
    assert planned == sections(compact)
    data = others = 0
    for name, value in model.state_dict().items():
        if not (name in before and before[name].dim() >= 2):
            others += 0 if name.endswith("num_batches_tracked") else 4 * value.numel()
            continue
        stored, outputs = before[name].numel(), before[name].shape[0]
        if sparsity and stored // outputs >= 32:
            blocks = outputs * math.ceil(stored / outputs / block)
            kept = int((before[name] != 0).sum())
            if math.ceil(kept * bits / 8) + math.ceil(blocks / 8) < math.ceil(stored * bits / 8):
                stored = kept
                data += math.ceil(blocks / 8)
        data += math.ceil(stored * bits / 8) + 4 * outputs
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert nbytes == header + data + others

    loaded = load_packed(path)
    assert (loaded.bits, loaded.block) == (bits, block)
    assert loaded.recognizer.tokens == shared.tokens
    assert loaded.recognizer.features == shared.features
    assert loaded.recognizer.about == {"a": "ü"}
    features = tones.test.features(0)
    assert torch.equal(loaded.recognizer.logits(features), compact.recognizer.logits(features))
    for name, weight in model.named_parameters():
        assert torch.equal(weight, loaded.recognizer.model.get_parameter(name))
        if is_matrix(weight):  # rounded by at most half a step, if nothing was clipped
            limit = 2 ** (bits - 1) - 1
            step = before[name].flatten(1).abs().amax(1) / limit
            error = (weight - before[name]).flatten(1).abs()
            assert bits == 4 or bool((error <= step[:, None] * (0.5 + 1e-5) + 1e-30).all())
            assert bool((weight[before[name] == 0] == 0).all())
    path_again = tmp_path / "again.safetensors"
    save_packed(loaded, path_again)
    assert path_again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("bits", "again"), [(8, 8), (4, 4), (8, 4)])
def test_zeros_of_rounding_are_not_taken_for_pruning(
    shared: Recognizer, tmp_path: Path, bits: int, again: int
) -> None:
    """A file of few bits, packed once more, is no larger than planned."""
    first = compress_weights(Recognizer(copy.deepcopy(shared.model), shared.tokens, shared.features), bits)
    save_packed(first, tmp_path / "first.safetensors")
    loaded = Recognizer.load(tmp_path / "first.safetensors")
    weights = [one for one in loaded.model.parameters() if is_prunable(one)]
    assert any(bool((one == 0).any()) for one in weights)
    second = compress_weights(loaded, again)
    assert all(one.is_kept is None for one in second.tensors.values())
    assert sections(second) == planned_sections(loaded.model, again, 0.0, 1)


def pruned(recognizer: Recognizer, sparsity: float) -> AcousticModel:
    model = copy.deepcopy(recognizer.model)
    apply_masks(model, make_masks(model, sparsity, PruningSettings(sparsity)))
    return model


def zeros(model: AcousticModel) -> dict[str, torch.Tensor]:
    return {name: one.detach() == 0 for name, one in model.named_parameters() if is_prunable(one)}


@pytest.mark.parametrize("sparsity", [0.0, 0.6, 0.9])
def test_what_was_pruned_before_stays_zero_at_every_step(
    sparsity: float, shared: Recognizer, tones: Tones
) -> None:
    model = pruned(shared, 0.7)
    before = zeros(model)
    seen = []

    def look(what: str, done: int, total: int) -> None:
        seen.append(all(bool(now[before[name]].all()) for name, now in zeros(model).items()))

    training = replace(REFINING.training, epochs=2)
    recipe = replace(REFINING, training=training, pruning=replace(REFINING.pruning, sparsity=sparsity))
    refine(model, Examples(tones.corpus, TOKENS, FrameRate("ctc", 2)), recipe, progress=look)
    assert len(seen) > 4
    assert all(seen)
    for name, now in zeros(model).items():
        num = now.numel()
        assert int(now.sum()) == max(int(before[name].sum()), num - num_kept(num, sparsity))


def test_a_few_zeros_learn_again(shared: Recognizer, tones: Tones) -> None:
    """They may be what rounding left: a mask for them would not save a byte."""
    model = pruned(shared, 0.05)
    recipe = replace(REFINING, training=replace(REFINING.training, epochs=1), pruning=PruningSettings())
    refine(model, Examples(tones.corpus, TOKENS, FrameRate("ctc", 2)), recipe)
    assert all(float(now.float().mean()) < 0.01 for now in zeros(model).values())


def test_each_shared_matrix_is_stored_once(shared: Recognizer, tmp_path: Path) -> None:
    compact = compress_weights(Recognizer(copy.deepcopy(shared.model), shared.tokens, shared.features))
    save_packed(compact, tmp_path / "m.safetensors")
    stored = load_file(tmp_path / "m.safetensors")["values"].numel()
    assert stored == sum(x.numel() for x in shared.model.parameters() if x.dim() >= 2)
    unshared = replace(SANM, sharing="none").build(40, 4)
    assert sum(x.numel() for x in unshared.parameters() if x.dim() >= 2) > 1.5 * stored


def test_damaged_files_are_refused(shared: Recognizer, tmp_path: Path) -> None:
    compact = compress_weights(Recognizer(copy.deepcopy(shared.model), shared.tokens, shared.features))
    path = tmp_path / "model.safetensors"
    save_packed(compact, path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in range(header, len(whole), len(whole) // 29):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ModelError, match="is damaged"):
            load_packed(path)
    for size in (0, 5, 100, header, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match="cannot be read"):
            load_packed(path)
    path.write_bytes(whole + b"0")
    with pytest.raises(ModelError, match="cannot be read"):
        load_packed(path)
    path.write_bytes(whole.replace(b'\\"format\\":1', b'\\"format\\":9'))
    with pytest.raises(ModelError, match="format 9"):
        Recognizer.load(path)
    with pytest.raises(ModelError, match="there is no file"):
        load_packed(tmp_path / "none")
    path.write_bytes(whole)
    assert Recognizer.load(path).tokens == shared.tokens


@pytest.mark.parametrize("block", [1, 4])
def test_a_refined_recognizer_is_sparse_rounded_and_no_worse_than_one_pruned_at_once(
    shared: Recognizer, tones: Tones, block: int
) -> None:
    recipe = replace(
        REFINING,
        training=replace(REFINING.training, epochs=8),
        pruning=replace(REFINING.pruning, sparsity=0.9, block=block),
    )
    before = {name: x.clone() for name, x in shared.model.state_dict().items()}
    compact = compress_recognizer(shared, tones.corpus, recipe)
    assert all(torch.equal(x, before[name]) for name, x in shared.model.state_dict().items())
    for weight in compact.recognizer.model.parameters():
        if is_prunable(weight):
            rows = torch.nn.functional.pad(weight.flatten(1), (0, -weight[0].numel() % block))
            zeros = (rows.view(-1, block) == 0).all(1)
            assert int(zeros.sum()) >= round(0.9 * len(zeros))
    at_once = copy.deepcopy(shared.model)
    apply_masks(at_once, make_masks(at_once, 0.9, recipe.pruning))
    worse = compress_weights(Recognizer(at_once, shared.tokens, shared.features)).recognizer
    assert corpus_loss(compact.recognizer, tones) < corpus_loss(worse, tones)


def corpus_loss(recognizer: Recognizer, tones: Tones) -> float:
    """Of what was learned from."""
    examples = Examples(tones.corpus, TOKENS, FrameRate("ctc", 2))
    batch = collate(examples, examples.rows, [tones.corpus.features(row) for row in examples.rows])
    with torch.no_grad():
        logits = recognizer.model(batch.features, batch.lengths)
    return float(batch_loss(logits, batch, examples, RECIPE, None))


@pytest.mark.parametrize(("stop", "given_sparsity"), [(0.5, 0.0), (1, 0.05), (0.5, 0.05), (2, 0.8)])
def test_refining_stops_and_goes_on_to_the_same_weights(
    stop: float, given_sparsity: float, shared: Recognizer, tones: Tones, tmp_path: Path
) -> None:
    examples = Examples(tones.corpus, TOKENS, FrameRate("ctc", 2))
    given = pruned(shared, given_sparsity)
    whole, stopped = copy.deepcopy(given), copy.deepcopy(given)
    losses = refine(whole, examples, REFINING)

    def press(what: str, done: int, total: int) -> None:
        if done == (stop if stop >= 1 else total // 2):
            raise KeyboardInterrupt

    checkpoint = TrainingCheckpoint(tmp_path / "c.safetensors", REFINING.digest(stopped, examples, None))
    with pytest.raises(KeyboardInterrupt):
        refine(stopped, examples, REFINING, checkpoint=checkpoint, progress=press)
    again = copy.deepcopy(given)
    assert refine(again, examples, REFINING, checkpoint=checkpoint) == losses
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_refining_learns_from_an_unshared_teacher(shared: Recognizer, tones: Tones, tmp_path: Path) -> None:
    teacher = train(
        replace(RECIPE, model=replace(SANM, sharing="none"), epochs=2), tones.corpus, TOKENS
    ).recognizer
    targets = record_targets([teacher], tones.corpus, tmp_path / "targets", TeachingSettings("topk=3"))
    taught = compress_recognizer(shared, tones.corpus, REFINING, targets=targets)
    alone = compress_recognizer(shared, tones.corpus, REFINING)
    assert taught.recognizer.about["taught"] is True
    assert taught.recognizer.digest != alone.recognizer.digest
    with pytest.raises(TargetsError, match="another data"):
        compress_recognizer(shared, tones.test, REFINING, targets=targets)


def test_recovery_terms_are_refined_and_rounded_too(tones: Tones) -> None:
    settings = replace(SANM, rank=2, adapter=4, num_layers=2, sharing="all")
    begun = Recognizer(settings.build(40, 4), TOKENS, tones.corpus.settings.features)
    recipe = replace(REFINING, training=replace(REFINING.training, epochs=1))
    compact = compress_recognizer(begun, tones.corpus, recipe)
    names = {name for name, _ in begun.model.named_parameters() if "low_rank" in name or "adapter" in name}
    assert {name for name in names if not name.endswith(("bias", "norm.weight"))} <= set(compact.tensors)
    changed = [
        not torch.equal(begun.model.state_dict()[x], compact.recognizer.model.state_dict()[x]) for x in names
    ]
    assert all(changed)


def test_training_sees_the_weights_that_are_stored(shared: Recognizer, tones: Tones) -> None:
    """With rounding from the first step on and a rate of 0 the first loss is that of the compact model."""
    training = replace(REFINING.training, epochs=1, batch_seconds=1000.0, learning_rate=1e-30)
    recipe = RefiningRecipe(training=training, quantize_from=0.0)
    examples = Examples(tones.corpus, TOKENS, FrameRate("ctc", 2))
    model = copy.deepcopy(shared.model)
    (loss,) = refine(model, examples, recipe)
    compact = compress_weights(Recognizer(copy.deepcopy(shared.model), TOKENS, shared.features)).recognizer
    rows = sorted(examples.rows, key=lambda row: tones.corpus.num_frames(row))
    batch = collate(examples, rows, [tones.corpus.features(row) for row in rows])
    plain = copy.deepcopy(shared.model)
    with torch.no_grad():
        expected, other = (
            float(batch_loss(one.train()(batch.features, batch.lengths), batch, examples, training, None))
            for one in (compact.model, plain)
        )
    # Rows of one length may be in another order, so the norms' sums are rounded otherwise.
    assert math.isclose(loss, expected, rel_tol=1e-5)
    assert not math.isclose(loss, other, rel_tol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PruningSettings(1.0), "the sparsity is 1.0"),
        (lambda: PruningSettings(0.5, block=2), "blocks have 2 weights: give 1 or 4"),
        (lambda: PruningSettings(0.5, scope="all"), "the scope is 'all'"),  # type: ignore[arg-type]
        (lambda: PruningSettings(0.5, start=0.6, end=0.5), "from 0.6 to 0.5 of the steps"),
        (lambda: PruningSettings(0.5, every=0), "every 0 steps"),
        (lambda: RefiningRecipe(bits=3), "weights have 3 bits"),
        (lambda: RefiningRecipe(quantize_from=1.5), "rounded from 1.5"),
    ],
)
def test_bad_settings_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(InputError, match=message):
        make()


def test_weights_that_are_no_numbers_are_named(shared: Recognizer) -> None:
    model = copy.deepcopy(shared.model)
    with torch.no_grad():
        model.get_parameter("sets.1.up")[0, 0] = math.nan
    with pytest.raises(ModelError, match=r"sets\.1\.up holds weights that are not numbers"):
        compress_weights(Recognizer(model, shared.tokens, shared.features))


def test_the_metadata_say_what_the_file_is(shared: Recognizer) -> None:
    compact = compress_weights(Recognizer(copy.deepcopy(shared.model), shared.tokens, shared.features))
    told = json.loads(packed_metadata(compact)["modicum"])
    assert told["model"]["sharing"] == "cycle"
    assert told["sparse"] == []
