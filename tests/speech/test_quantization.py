"""int8 recognizers: saved and loaded bit for bit, trained, and refused where they cannot be."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from typer.testing import CliRunner

from modicum.cli import app
from modicum.errors import InputError, ModelError
from modicum.measure import LatencyOracle
from modicum.quant import Conv1dShape, RSQLossSettings
from modicum.quant.calibration import quantized_layers
from modicum.quant.integer_model import describe_layers, integer_layers
from modicum.speech import (
    ConvCtcSettings,
    ConvDfsmnCtcSettings,
    FeatureSettings,
    ModelSettings,
    QuantizationSettings,
    Recognizer,
    Wav2letterCtcSettings,
    evaluate,
    quantize,
    train,
)
from modicum.speech.compact.compressed import compress_weights
from modicum.speech.compact.compression import compress_recognizer
from modicum.speech.compact.onnx_export import export_onnx
from modicum.speech.compact.packed_file import save_packed
from modicum.speech.compact.packing import PackSettings, pack
from modicum.speech.examples import Examples, FrameRate, collate
from modicum.speech.quantization import SCHEMES, float_model
from modicum.speech.quantize_entry import quantize_recognizer
from modicum.speech.rsq_training import RSQTraining
from tests.bounds import FUNCTION, gamma
from tests.speech.conftest import QUICK, TOKENS, Stop, Tones

MODELS: dict[str, ModelSettings] = {
    "convdfsmn": ConvDfsmnCtcSettings(hidden=24, projection=16, num_layers=3),
    "wav2letter": Wav2letterCtcSettings(width=20, num_layers=3, head=24),
}
UNTRAINED = QuantizationSettings(epochs=0, use_oracle=False, num_calibration=6, num_search=2)
TRAINED = replace(UNTRAINED, epochs=2, batch_seconds=8, learning_rate=1e-3, spec_augment=False)


@pytest.fixture(scope="module")
def floats(tones: Tones) -> dict[str, Recognizer]:
    """A float recognizer of each model, which has learned its letters."""
    recipes = {name: replace(QUICK, model=settings, epochs=40) for name, settings in MODELS.items()}
    return {name: train(recipe, tones.corpus, TOKENS).recognizer for name, recipe in recipes.items()}


def error_rate(recognizer: Recognizer, tones: Tones) -> float:
    rate = evaluate([recognizer], tones.test).character_error_rate
    assert rate is not None
    return rate.value


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_saved_int8_recognizer_gives_the_same_output_bit_for_bit(
    name: str, scheme: str, tones: Tones, floats: dict[str, Recognizer], tmp_path: Path
) -> None:
    before = floats[name].digest
    found = quantize(floats[name], tones.corpus, replace(UNTRAINED, scheme=scheme), out=tmp_path / "int8")
    assert sorted(path.name for path in (tmp_path / "int8").iterdir()) == [
        "model.safetensors",
        "recognizer.json",
    ]
    loaded = Recognizer.load(tmp_path / "int8")
    for row in range(3):
        features = tones.test.features(row)
        assert torch.equal(loaded.logits(features), found.recognizer.logits(features))
    audio = tones.test.utterances[0].audio
    assert loaded.transcribe(audio) == found.recognizer.transcribe(audio)
    assert loaded.digest == found.recognizer.digest != before
    assert dict(loaded.about) == json.loads(json.dumps(dict(found.recognizer.about)))
    assert floats[name].digest == before, "the float recognizer was changed"
    layers = describe_layers(loaded.model)
    taken = {key for key, fields in layers.items() if fields["scheme"] == scheme}
    wide = {f"layers.{i}.memory" if name == "convdfsmn" else f"layers.{i}.conv" for i in range(3)}
    assert taken == (set(layers) if scheme == "direct" else wide)
    assert not list(loaded.model.parameters()), "a layer is not int8"
    assert loaded.model.num_parameters == float_model(floats[name]).num_parameters
    assert error_rate(loaded, tones) < 0.2
    loaded.save(tmp_path / "again")
    first, second = ((tmp_path / x / "model.safetensors").read_bytes() for x in ("int8", "again"))
    assert first == second


def test_a_file_holds_a_byte_for_each_weight(
    tones: Tones, floats: dict[str, Recognizer], tmp_path: Path
) -> None:
    settings = MODELS["wav2letter"]
    assert isinstance(settings, Wav2letterCtcSettings)
    width, head, classes = settings.width, settings.head, TOKENS.num_classes
    for scheme, products in (("direct", 3), ("rsq", 4)):
        quantize(floats["wav2letter"], tones.corpus, replace(UNTRAINED, scheme=scheme), out=tmp_path / scheme)
        weights = 5 * 40 * width + 3 * products * width**2 + width * head + head * classes
        scales = 4 * (2 * (4 * width + head + classes) + 6)  # of each filter, its bias; of each input
        with safe_open(tmp_path / scheme / "model.safetensors", framework="pt") as file:
            sizes = {key: file.get_tensor(key).nbytes for key in file.keys()}  # noqa: SIM118
        schemes = sum(size for key, size in sizes.items() if key.endswith("_extra_state"))
        assert 0 < schemes <= 200 * 6  # a few settings of each layer, as text
        assert sum(sizes.values()) - schemes == weights + scales
        size = (tmp_path / scheme / "model.safetensors").stat().st_size
        header = int.from_bytes((tmp_path / scheme / "model.safetensors").read_bytes()[:8], "little")
        assert size == weights + scales + schemes + header + 8


@given(
    name=st.sampled_from(sorted(MODELS)),
    scheme=st.sampled_from(["direct", "limited", "rsq"]),
    backend=st.sampled_from(["auto", "torch"]),
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=4),
)
@torch.no_grad()
def test_in_int8_an_utterance_does_not_depend_on_its_batch_bit_for_bit(
    name: str, scheme: str, backend: str, sizes: list[int], tones: Tones, floats: dict[str, Recognizer]
) -> None:
    model = int8_of(name, scheme, tones, floats).model
    for layer in integer_layers(model).values():
        layer.backend = backend  # type: ignore[assignment]  # one of its names
    generator = torch.Generator().manual_seed(sum(sizes))
    utterances = [torch.randn(size, 40, generator=generator) for size in sizes]
    lengths = torch.tensor(sizes)
    together = model(pad_sequence(utterances, batch_first=True, padding_value=1e6), lengths)
    for row, one in enumerate(utterances):
        alone = model(one[None], lengths[row : row + 1])[0]
        assert torch.equal(together[row, : len(alone)], alone)


_INT8: dict[tuple[str, str], Recognizer] = {}


def int8_of(name: str, scheme: str, tones: Tones, floats: dict[str, Recognizer]) -> Recognizer:
    if (name, scheme) not in _INT8:
        settings = replace(UNTRAINED, scheme=scheme)
        _INT8[name, scheme] = quantize(floats[name], tones.corpus, settings).recognizer
    return _INT8[name, scheme]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_loss_of_a_padded_batch_is_that_of_its_utterances(
    name: str, tones: Tones, floats: dict[str, Recognizer]
) -> None:
    """L = CTC + μ Σ_l ‖y − f‖² / ‖f‖² + κ KL(float ‖ int8) over valid frames, each utterance on its own."""
    teacher = float_model(floats[name]).double()
    examples = Examples(tones.corpus, TOKENS, FrameRate("ctc", 2))
    student = prepared(name, tones, floats).double()
    rows = examples.rows[:3]
    features = [tones.corpus.features(row).double() for row in rows]
    weights = RSQLossSettings(0.3, 0.7)
    loop = RSQTraining(student, examples, QUICK, None, None, teacher=teacher, weights=weights)
    names = list(quantized_layers(student))
    with torch.no_grad():
        found = float(loop.loss(collate(examples, rows, features)))
        task, divergence, frames = 0.0, 0.0, 0
        noise, power = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        for row, one in zip(rows, features, strict=True):
            ours, exact = outputs(student, names, one), outputs(teacher, names, one)
            for layer in names:
                noise[layer] += float((ours[layer] - exact[layer]).square().sum())
                power[layer] += float(exact[layer].square().sum())
            q, p = (x["logits"][0].log_softmax(-1) for x in (ours, exact))
            divergence += float((p.exp() * (p - q)).sum())
            frames += len(q)
            labels = examples.labels(row)
            task += float(
                nn.functional.ctc_loss(
                    q[:, None], labels[None], torch.tensor([len(q)]), torch.tensor([len(labels)])
                )
            ) / len(rows)
    parts = sum(noise[layer] / power[layer] for layer in names)
    expected = task + 0.3 * parts + 0.7 * divergence / frames
    # Integers are the same in a batch: what differs is the order of sums of all frames and of CTC's paths.
    operations = frames * (max(len(x) for x in names) + 40 * FUNCTION)
    assert abs(found - expected) <= 2 * gamma(operations, torch.float64) * (abs(task) + parts + 10 * frames)


def prepared(name: str, tones: Tones, floats: dict[str, Recognizer]) -> nn.Module:
    """With fake quantisation and ranges, in evaluation mode."""
    from modicum.quant import QuantSettings, calibrate, quantize_model

    class Alone(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, features: Tensor) -> Tensor:
            logits: Tensor = self.model(features[None], torch.tensor([len(features)]))
            return logits

    student = copy.deepcopy(float_model(floats[name]))
    with pytest.warns(UserWarning, match="direct int8 is used"):
        quantize_model(student, QuantSettings("rsq"))
    calibrate(Alone(student), [tones.corpus.features(row) for row in range(4)])
    return student.eval()


def outputs(model: nn.Module, names: list[str], features: Tensor) -> dict[str, Tensor]:
    from modicum.quant import recorded_outputs

    with recorded_outputs(model, names) as found:
        logits = model(features[None], torch.tensor([len(features)]))
    return {**found, "logits": logits}


@pytest.mark.parametrize("stops", [[3], [1, 4]])
def test_a_stopped_rsq_training_ends_as_if_it_had_not_been(
    stops: list[int], tones: Tones, floats: dict[str, Recognizer], tmp_path: Path, stop_at: Stop
) -> None:
    expected = quantize(floats["wav2letter"], tones.corpus, TRAINED)
    assert len(expected.losses) > max(stops)
    for step in stops:
        with pytest.raises(KeyboardInterrupt):
            quantize(
                floats["wav2letter"], tones.corpus, TRAINED, out=tmp_path / "out", progress=stop_at(step)
            )
        assert (tmp_path / "out" / "state" / "training.safetensors").exists()
        assert not (tmp_path / "out" / "recognizer.json").exists()
    with pytest.raises(InputError, match="is of a training with another student"):
        quantize(floats["wav2letter"], tones.corpus, replace(TRAINED, seed=1), out=tmp_path / "out")
    result = quantize(floats["wav2letter"], tones.corpus, TRAINED, out=tmp_path / "out")
    assert result.losses == expected.losses
    assert result.recognizer.digest == expected.recognizer.digest
    assert not (tmp_path / "out" / "state").exists()


@torch.no_grad()
def test_training_brings_int8_nearer_to_the_float_model(tones: Tones, floats: dict[str, Recognizer]) -> None:
    """With a heavy weight of distillation, on what it was trained on."""
    loss = RSQLossSettings(noise=1.0, distillation=30.0)
    settings = replace(TRAINED, scheme="limited", loss=loss, epochs=6, learning_rate=3e-4)
    with torch.enable_grad():
        trained = quantize(floats["convdfsmn"], tones.corpus, settings).recognizer
    divergences = []
    for one in (int8_of("convdfsmn", "limited", tones, floats), trained):
        total = 0.0
        for row in range(16):
            features = tones.corpus.features(row)
            p, q = (x.logits(features).double().log_softmax(-1) for x in (floats["convdfsmn"], one))
            total += float((p.exp() * (p - q)).sum())
        divergences.append(total)
    assert divergences[1] < divergences[0]


class Said(LatencyOracle[Conv1dShape]):
    """An oracle that always says the same, and notes what it was asked."""

    def __init__(self, answer: str) -> None:
        self.answer, self.asked = answer, []  # type: ignore[var-annotated]

    def choose(self, shape: Conv1dShape) -> str:
        self.asked.append(shape)
        return self.answer


@pytest.mark.parametrize("answer", ["direct", "winograd"])
def test_the_oracle_decides_for_each_layer_and_is_asked_at_the_usual_length(
    answer: str, tones: Tones, floats: dict[str, Recognizer]
) -> None:
    oracle = Said(answer)
    settings = replace(UNTRAINED, use_oracle=True)
    found = quantize(floats["convdfsmn"], tones.corpus, settings, oracle=oracle).recognizer
    schemes = {name: fields["scheme"] for name, fields in describe_layers(found.model).items()}
    memories = [name for name in schemes if name.endswith("memory")]
    assert {schemes[name] for name in memories} == {"rsq" if answer == "winograd" else "direct"}
    lengths = sorted(-(-tones.corpus.num_frames(row) // 2) for row in range(len(tones.corpus)))
    assert len(oracle.asked) == len(memories)
    for shape in oracle.asked:
        assert (shape.channels, shape.filters) == (16, 16)
        assert lengths[0] < shape.length < lengths[-1]


def test_what_cannot_be_quantised_is_refused(
    tones: Tones, floats: dict[str, Recognizer], tmp_path: Path
) -> None:
    linear = ConvCtcSettings(width=4, num_blocks=1).build(40, TOKENS.num_classes)
    with pytest.raises(ModelError, match="the conv model has weights that are not of convolutions"):
        quantize(replace(floats["wav2letter"], model=linear), tones.corpus, UNTRAINED)
    with pytest.raises(ModelError, match="is quantised already: give the float one"):
        quantize(int8_of("wav2letter", "rsq", tones, floats), tones.corpus, UNTRAINED)
    other = replace(
        floats["wav2letter"], features=replace(floats["wav2letter"].features, frame_shift_ms=12.5)
    )
    with pytest.raises(ModelError, match="read other features"):
        quantize(other, tones.corpus, UNTRAINED)
    broken = replace(floats["wav2letter"], model=copy.deepcopy(floats["wav2letter"].model))
    with torch.no_grad():
        broken.model.get_parameter("layers.0.conv.weight")[0] = float("nan")
    with pytest.raises(InputError, match=r"layers\.\d\.conv was given values that are not finite numbers"):
        quantize(broken, tones.corpus, UNTRAINED)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"is not empty, it holds notes\.txt"):
        quantize(floats["wav2letter"], tones.corpus, UNTRAINED, out=tmp_path)


def test_what_needs_float_weights_refuses_int8_ones(
    tones: Tones, floats: dict[str, Recognizer], tmp_path: Path
) -> None:
    int8, out = int8_of("wav2letter", "rsq", tones, floats), tmp_path / "out"
    for refused in (
        lambda: pack(int8, tones.folder, out, PackSettings(10**6), test=tones.test_folder),
        lambda: compress_recognizer(int8, tones.corpus),
        lambda: compress_weights(int8),
        lambda: export_onnx(int8, out),
    ):
        with pytest.raises(ModelError, match="is quantised already: give the float one"):
            refused()
    assert not list(tmp_path.iterdir())


def test_a_packed_file_is_quantised(tones: Tones, tmp_path: Path) -> None:
    recognizer = Recognizer(MODELS["wav2letter"].build(40, 4).eval(), TOKENS, FeatureSettings())
    packed = tmp_path / "packed.safetensors"
    nbytes = save_packed(compress_weights(recognizer), packed)
    report = quantize_recognizer(packed, tones.folder, tmp_path / "int8", UNTRAINED)
    assert report.float_nbytes == nbytes
    assert report.nbytes == (tmp_path / "int8" / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheme": "int4"}, "scheme is 'int4': choose one of direct, rsq, limited, tapwise"),
        ({"scheme": "tapwise"}, "tapwise has no compiled kernel"),
        ({"epochs": -1}, "epochs is -1"),
        ({"num_calibration": 0}, "num_calibration is 0"),
        ({"num_search": 0}, "num_search is 0"),
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0"),
        ({"batch_seconds": -1.0}, "batch_seconds is -1"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        QuantizationSettings(**fields)  # type: ignore[arg-type]  # some are out of range, none of another type


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"layers.0.conv": {"scheme": "fast"}}, "has the scheme 'fast', which is not known"),
        ({"nothing": {"scheme": "direct"}}, "layer nothing cannot be restored"),
        ({"output": {"scheme": "direct"}}, "cannot be read"),
        ("all of them", "cannot be read"),
    ],
)
def test_damaged_int8_folders_are_refused(
    layers: object, message: str, tones: Tones, floats: dict[str, Recognizer], tmp_path: Path
) -> None:
    int8_of("wav2letter", "rsq", tones, floats).save(tmp_path / "int8")
    path = tmp_path / "int8" / "recognizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"integer_layers": layers}))
    with pytest.raises(ModelError, match=message):
        Recognizer.load(tmp_path / "int8")


def command(*words: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["speech", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_command_quantises_and_its_folder_is_used(
    tones: Tones, floats: dict[str, Recognizer], tmp_path: Path
) -> None:
    floats["wav2letter"].save(tmp_path / "float")
    words = ("--no-oracle", "--epochs", "1", "--batch-seconds", "8", "--features", tmp_path / "features")
    quick = ("quantize", tmp_path / "float", tones.folder, *words)
    code, out, err = command(*quick, "--out", tmp_path / "int8")
    assert code == 0, err
    assert "direct: first.conv, head.conv, output\nrsq F(2,3): layers.0.conv (α" in out
    assert "64 utterances" in out
    assert err.strip() == f"use it as --model {tmp_path / 'int8'}"
    code, out, err = command(*quick, "--out", tmp_path / "json", "--json", "--scheme", "limited")
    assert code == 0, err
    told = json.loads(out)
    assert (
        told["nbytes"] == (tmp_path / "json" / "model.safetensors").stat().st_size < told["float_nbytes"] / 2
    )
    assert told["layers"]["layers.1.conv"]["scheme"] == "limited"
    code, _, err = command(*quick, "--out", tmp_path / "a", "--features", tmp_path / "a" / "features")
    assert (code, "of the features is in " in err) == (2, True)
    audio = tones.test.utterances[0].audio
    code, out, err = command("transcribe", audio, "--model", tmp_path / "int8")
    assert (code, out) == (0, Recognizer.load(tmp_path / "int8").transcribe(audio).text + "\n")
    code, out, err = command("evaluate", tones.test_folder, "-m", tmp_path / "int8", "-m", tmp_path / "float")
    assert code == 0, err
    assert "WER" in out
    for wrong, message in (
        (("--scheme", "int4", "--out", tmp_path / "a"), "scheme is 'int4'"),
        (("--out", tmp_path / "float"), "is not empty"),
        (("--epochs", "-1", "--out", tmp_path / "a"), "epochs is -1"),
    ):
        code, _, err = command(*quick, *wrong)
        assert (code, message in err) == (2, True), err
    code, _, err = command("quantize", tmp_path / "none", tones.folder, "--out", tmp_path / "a")
    assert code == 2
    assert "holds no recognizer" in err
    code, _, err = command(
        "quantize", tmp_path / "float", tones.folder, "--out", tmp_path / "a", "--scheme", "tapwise"
    )
    assert code == 2
    assert "--no-oracle" in err
