"""Acoustic models: formulas against plain loops, lengths, and batches that do not mix utterances."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from modicum.errors import InputError, ModelError
from modicum.speech import (
    ConvCtcSettings,
    ConvDfsmnCtcSettings,
    DfsmnCtcSettings,
    FrameModelSettings,
    Wav2letterCtcSettings,
    model_settings,
)
from modicum.speech.acoustic_model import AcousticModel, ModelSettings, inside, settings_from_dict
from modicum.speech.compact.sanm import SanmSettings
from modicum.speech.conv_dfsmn import ConvDfsmnCtc
from modicum.speech.dfsmn import DfsmnCtc, DfsmnMemory
from modicum.speech.frame_norm import FrameNorm
from modicum.speech.normed_conv import fold_norms
from modicum.speech.sizes import SIZES
from tests.bounds import FUNCTION, assert_within, gamma

SMALL: list[ModelSettings] = [
    ConvCtcSettings(width=12, num_blocks=2, kernel=5),
    DfsmnCtcSettings(hidden=10, projection=6, num_layers=2, left=2, right=3, left_stride=2, right_stride=1),
    FrameModelSettings(width=9, num_layers=2, context=3),
    ConvDfsmnCtcSettings(hidden=10, projection=6, num_layers=3),
    Wav2letterCtcSettings(width=8, num_layers=2, kernel=5, head=9),
]
# What attention adds up for a frame, and so its rounding, has no bound by magnitudes of weights alone.
SANM = SanmSettings(width=8, num_layers=2, num_heads=2, hidden=12, kernel=5, sharing="all", rank=1, adapter=2)
MELS, CLASSES = 7, 5


def built(settings: ModelSettings, seed: int = 0) -> AcousticModel:
    """In float64, with norms that have seen data, in evaluation mode."""
    torch.manual_seed(seed)
    model = settings.build(MELS, CLASSES).double()
    for module in model.modules():
        if isinstance(module, FrameNorm):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


def rounding_bound(model: AcousticModel, features: Tensor, lengths: Tensor) -> Tensor:
    """Error of the logits: γ_k · |W_L| ··· |W_1| |x|, as ReLU enlarges no error.

    k counts the operations of the longest way: a dot product in each layer, and a norm's few.
    """
    magnitude = copy.deepcopy(model)
    operations = 0
    for module in magnitude.modules():
        if isinstance(module, FrameNorm):
            module.running_mean.abs_().neg_()  # type: ignore[union-attr]
            operations += 4 + 2 * FUNCTION
        for name, parameter in module.named_parameters(recurse=False):
            parameter.data.abs_()
            if name != "bias":
                operations += parameter[0].numel() + 2
    found: Tensor = gamma(operations, features.dtype) * magnitude(features.abs(), lengths)
    return found


@pytest.mark.parametrize("settings", SMALL, ids=lambda settings: settings.name)
@torch.no_grad()
def test_an_utterance_in_a_padded_batch_is_what_it_is_alone(settings: ModelSettings) -> None:
    model = built(settings)
    utterances = [torch.randn(size, MELS, dtype=torch.float64) for size in (13, 4, 9, 1)]
    lengths = torch.tensor([len(one) for one in utterances])
    padded = pad_sequence(utterances, batch_first=True, padding_value=1e6)
    together = model(padded, lengths)
    for row, one in enumerate(utterances):
        size = lengths[row : row + 1]
        alone = model(one[None], size)[0]
        frames = int(model.output_lengths(size))
        assert len(alone) == frames
        bound = 2 * rounding_bound(model, one[None], size)[0]
        assert_within(together[row, :frames], alone, bound, "an utterance in a batch")


@torch.no_grad()
def test_an_utterance_in_a_padded_batch_of_an_attention_model_is_what_it_is_alone() -> None:
    model = built(SANM)
    utterances = [torch.randn(size, MELS, dtype=torch.float64) for size in (23, 4, 9, 1)]
    lengths = torch.tensor([len(one) for one in utterances])
    together = model(pad_sequence(utterances, batch_first=True, padding_value=1e6), lengths)
    for row, one in enumerate(utterances):
        alone = model(one[None], lengths[row : row + 1])[0]
        # Some 500 roundings on the longest way; norms of 8 numbers enlarge them by less than 1e3.
        bound = 1e3 * gamma(500, torch.float64) * (1 + float(alone.abs().max()))
        assert float((together[row, : len(alone)] - alone).abs().max()) <= bound


@pytest.mark.parametrize("settings", [*SMALL, SANM], ids=lambda settings: settings.name)
@torch.no_grad()
def test_a_batch_in_training_depends_on_nothing_in_its_padding(settings: ModelSettings) -> None:
    features, lengths = torch.randn(3, 11, MELS), torch.tensor([11, 5, 8])
    outside = ~inside(lengths, 11)
    other = features.clone()
    other[outside] = 1e6
    models = [built(settings).float().train() for _ in range(2)]
    first, second = (model(given, lengths) for model, given in zip(models, (features, other), strict=True))
    frames = inside(models[0].output_lengths(lengths), first.shape[1])
    assert torch.equal(first[frames], second[frames])
    for a, b in zip(models[0].buffers(), models[1].buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", sorted(SIZES))
@pytest.mark.parametrize("subsampling", [1, 2, 3, 4])
@torch.no_grad()
def test_a_model_gives_a_frame_for_each_so_many_features(name: str, subsampling: int) -> None:
    settings = {
        "conv": ConvCtcSettings(subsampling, width=4, num_blocks=1, kernel=3),
        "dfsmn": DfsmnCtcSettings(subsampling, hidden=4, projection=2, num_layers=1),
        "frames": FrameModelSettings(subsampling, width=4, num_layers=1),
        "sanm": SanmSettings(subsampling, width=4, num_layers=1, num_heads=1, hidden=4, kernel=3),
        "convdfsmn": ConvDfsmnCtcSettings(subsampling, hidden=4, projection=2, num_layers=1),
        "wav2letter": Wav2letterCtcSettings(subsampling, width=4, num_layers=1, head=3),
    }[name]
    model = settings.build(MELS, CLASSES).eval()
    for size in range(1, 10):
        logits = model(torch.randn(1, size, MELS), torch.tensor([size]))
        expected = math.ceil(size / subsampling)
        assert logits.shape == (1, expected, CLASSES)
        assert model.output_lengths(torch.tensor([size])).tolist() == [expected]


def memory_by_loops(memory: DfsmnMemory, p: Tensor) -> list[list[float]]:
    """The formula of the module's docstring, without the skip connection, for p [T, P]."""
    s = memory.settings
    past, future, x = memory.past.tolist(), memory.future.tolist(), p.tolist()
    out = []
    for t in range(len(x)):
        row = []
        for channel in range(len(x[0])):
            value = x[t][channel]
            for i in range(s.left + 1):
                if t - s.left_stride * i >= 0:
                    value += past[channel][s.left - i] * x[t - s.left_stride * i][channel]
            for j in range(1, s.right + 1):
                if t + s.right_stride * j < len(x):
                    value += future[channel][j - 1] * x[t + s.right_stride * j][channel]
            row.append(value)
        out.append(row)
    return out


@given(
    left=st.integers(0, 4),
    right=st.integers(0, 4),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    frames=st.integers(1, 9),
)
@torch.no_grad()
def test_dfsmn_memory_is_its_formula(left: int, right: int, strides: tuple[int, int], frames: int) -> None:
    settings = DfsmnCtcSettings(1, 4, 3, 1, left, right, *strides)
    torch.manual_seed(left + 7 * right + 31 * frames)
    memory = DfsmnMemory(settings).double()
    p = torch.randn(frames, 3, dtype=torch.float64)
    expected = torch.tensor(memory_by_loops(memory, p), dtype=torch.float64)
    operations = left + right + 4
    bound = 2 * gamma(operations, torch.float64) * (operations * p.abs().max())  # taps are at most 1
    assert_within(memory(p[None])[0], expected, bound, "the memory")


@torch.no_grad()
def test_dfsmn_layers_are_their_formula() -> None:
    settings = DfsmnCtcSettings(1, 6, 4, 2, 2, 1, 1, 2)
    model = built(settings)
    assert isinstance(model, DfsmnCtc)
    features, lengths = torch.randn(1, 8, MELS, dtype=torch.float64), torch.tensor([8])
    hidden = model.norm(model.first(features.transpose(1, 2)).transpose(1, 2)).relu()[0]
    below = torch.zeros(8, 4, dtype=torch.float64)
    for layer in model.layers:
        p = torch.stack([layer.projection.weight @ frame for frame in hidden])
        below = torch.tensor(memory_by_loops(layer.memory, p), dtype=torch.float64) + below
        hidden = torch.stack([(layer.hidden.weight @ m + layer.hidden.bias).relu() for m in below])
    expected = torch.stack([model.output.weight @ frame + model.output.bias for frame in hidden])
    bound = 2 * rounding_bound(model, features, lengths)[0]
    assert_within(model(features, lengths)[0], expected, bound, "the model")


@given(kernel=st.sampled_from([1, 3, 5]), frames=st.integers(1, 7), layers=st.integers(1, 3))
@torch.no_grad()
def test_conv_dfsmn_layers_are_their_formula(kernel: int, frames: int, layers: int) -> None:
    settings = ConvDfsmnCtcSettings(1, hidden=5, projection=4, num_layers=layers, kernel=kernel)
    model = built(settings, kernel + 7 * frames + 31 * layers)
    assert isinstance(model, ConvDfsmnCtc)
    features, lengths = torch.randn(1, frames, MELS, dtype=torch.float64), torch.tensor([frames])
    hidden = model.first(features.mT, None).relu()[0].T.tolist()
    below = [[0.0] * 4 for _ in range(frames)]
    for layer in model.layers:
        v, u = layer.projection.weight[..., 0].tolist(), layer.hidden.weight[..., 0].tolist()
        a, b = layer.memory.weight.tolist(), layer.hidden.bias.tolist()
        p = [[math.fsum(x * y for x, y in zip(row, h, strict=True)) for row in v] for h in hidden]
        for t in range(frames):
            for i in range(4):
                terms = [below[t][i], p[t][i]]
                for k in range(-(kernel // 2), kernel // 2 + 1):
                    if 0 <= t + k < frames:
                        terms += [a[i][j][k + kernel // 2] * p[t + k][j] for j in range(4)]
                below[t][i] = math.fsum(terms)
        hidden = [
            [max(0.0, math.fsum([b[i], *(x * y for x, y in zip(u[i], m, strict=True))])) for i in range(5)]
            for m in below
        ]
    weight, bias = model.output.weight[..., 0].tolist(), model.output.bias.tolist()  # type: ignore[union-attr]
    expected = [
        [
            math.fsum([c, *(x * y for x, y in zip(row, h, strict=True))])
            for row, c in zip(weight, bias, strict=True)
        ]
        for h in hidden
    ]
    bound = 2 * rounding_bound(model, features, lengths)[0]
    found = model(features, lengths)[0]
    assert_within(found, torch.tensor(expected, dtype=torch.float64), bound, "the model")


@pytest.mark.parametrize("settings", SMALL[3:], ids=lambda settings: settings.name)
@torch.no_grad()
def test_folded_norms_change_nothing_but_rounding(settings: ModelSettings) -> None:
    model = built(settings)
    utterances = [torch.randn(size, MELS, dtype=torch.float64) for size in (9, 4)]
    lengths = torch.tensor([9, 4])
    padded = pad_sequence(utterances, batch_first=True, padding_value=1e6)
    inner = inside(lengths, 9)[..., None]
    bound = 4 * rounding_bound(model, padded * inner, lengths)  # folding rounds the weights, too
    expected = model(padded, lengths)
    fold_norms(model)
    assert not any(isinstance(module, FrameNorm) for module in model.modules())
    frames = inside(model.output_lengths(lengths), expected.shape[1])
    assert_within(model(padded, lengths)[frames], expected[frames], bound[frames], "the folded model")


def test_frame_norm_takes_its_statistics_from_valid_frames() -> None:
    norm = FrameNorm(2).double().train()
    x, lengths = torch.randn(3, 6, 2, dtype=torch.float64), torch.tensor([6, 2, 4])
    out = norm(x, inside(lengths, 6)).detach()
    for channel in range(2):
        values = [float(x[n, t, channel]) for n in range(3) for t in range(int(lengths[n]))]
        mean = math.fsum(values) / len(values)
        variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
        for n in range(3):
            for t in range(6):
                expected = (float(x[n, t, channel]) - mean) / math.sqrt(variance + norm.eps)
                if t >= int(lengths[n]):
                    expected = 0.0
                # The mean's error is amplified by 1 / deviation, the variance's by the value.
                bound = gamma(3 * len(values) + 4 * FUNCTION, torch.float64) * (1 + max(map(abs, values)))
                bound /= math.sqrt(variance)
                assert abs(float(out[n, t, channel]) - expected) <= bound * (1 + abs(expected))


@pytest.mark.parametrize("name", sorted(SIZES))
def test_sizes_grow_and_settings_come_back_from_json(name: str) -> None:
    counts = []
    for size in ("tiny", "small", "base"):
        settings = model_settings(name, size)
        assert settings_from_dict(settings.to_dict()) == settings
        model = settings.build(40, 30)
        assert model.num_parameters == sum(x.numel() for x in model.state_dict().values()) - sum(
            x.numel() for x in model.buffers()
        )
        counts.append(model.num_parameters)
    assert counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvCtcSettings(kernel=4), "the kernel has 4 taps: give an odd number"),
        (lambda: ConvCtcSettings(width=0), "width of a conv model is 0"),
        (lambda: ConvCtcSettings(dropout=1.0), "dropout is 1.0"),
        (lambda: ConvCtcSettings(subsampling=0), "subsampling of a conv model is 0"),
        (lambda: DfsmnCtcSettings(left=-1), "the memory has -1 past"),
        (lambda: DfsmnCtcSettings(left_stride=0), "left_stride of a dfsmn model is 0"),
        (lambda: ConvDfsmnCtcSettings(kernel=2), "the kernel has 2 taps: give an odd number"),
        (lambda: ConvDfsmnCtcSettings(projection=0), "projection of a convdfsmn model is 0"),
        (lambda: Wav2letterCtcSettings(kernel=2), "the kernel has 2 taps: give an odd number"),
        (lambda: Wav2letterCtcSettings(head=0), "head of a wav2letter model is 0"),
        (lambda: FrameModelSettings(context=-1), "the context is -1"),
        (lambda: FrameModelSettings(dropout=-0.5), "dropout is -0.5"),
        (lambda: ConvCtcSettings().build(0, 3), "a model of 0 features and 3 classes"),
        (
            lambda: model_settings("rnn", "tiny"),
            "model is 'rnn'; choose one of conv, dfsmn, convdfsmn, wav2letter, frames",
        ),
        (lambda: model_settings("conv", "huge"), "size is 'huge'; choose one of tiny"),
    ],
)
def test_bad_settings_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        make()


@pytest.mark.parametrize("saved", [{"name": "rnn"}, {"name": "conv", "wings": 2}, {}])
def test_unknown_settings_are_refused(saved: dict[str, object]) -> None:
    with pytest.raises(ModelError, match=r"acoustic model|cannot be used"):
        settings_from_dict(saved)
