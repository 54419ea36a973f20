"""SAN-M: the layer against plain loops, sharing maps, gradients of shared weights, recovery terms."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from modicum.errors import InputError
from modicum.speech.compact.sanm import SanmEncoder, SanmLayer, SanmSettings, WeightSet
from modicum.speech.compact.sharing import Sharing, sharing_map
from modicum.speech.frame_norm import FrameNorm
from tests.bounds import gamma

MELS, CLASSES = 6, 5


def built(settings: SanmSettings, seed: int = 0) -> SanmEncoder:
    """In float64, with no parameter or statistic left at the value it starts with, in evaluation mode."""
    torch.manual_seed(seed)
    model = settings.build(MELS, CLASSES).double()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 1 or not parameter.any():
                nn.init.normal_(parameter, std=0.5)
        if isinstance(module, FrameNorm):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model.eval()


def layer_norm(x: list[float], norm: nn.LayerNorm) -> list[float]:
    mean = math.fsum(x) / len(x)
    variance = math.fsum((v - mean) ** 2 for v in x) / len(x)
    scale, shift = norm.weight.tolist(), norm.bias.tolist()
    return [
        (v - mean) / math.sqrt(variance + norm.eps) * a + b for v, a, b in zip(x, scale, shift, strict=True)
    ]


def affine(x: list[float], weight: Tensor, bias: Tensor) -> list[float]:
    rows = weight.tolist()
    return [
        math.fsum(w * v for w, v in zip(row, x, strict=True)) + b
        for row, b in zip(rows, bias.tolist(), strict=True)
    ]


def layer_by_loops(layer: SanmLayer, weights: WeightSet, x: list[list[float]]) -> list[list[float]]:
    """The formulas of the module's docstring, for one utterance without padding."""
    s, size = layer.settings, len(x)
    d, d_k = s.width, s.width // s.num_heads
    projected = [affine(layer_norm(row, layer.attention_norm), weights.qkv, layer.qkv_bias) for row in x]
    query, key, value = ([row[i * d : (i + 1) * d] for row in projected] for i in range(3))
    taps, past = layer.memory[:, 0].tolist(), s.kernel // 2 + s.shift
    out = []
    for t in range(size):
        seen = [
            j
            for j in range(size)
            if (s.attention_left < 0 or j >= t - s.attention_left)
            and (s.attention_right < 0 or j <= t + s.attention_right)
        ]
        attended = []
        for head in range(s.num_heads):
            span = range(head * d_k, (head + 1) * d_k)
            scores = [math.fsum(query[t][c] * key[j][c] for c in span) / math.sqrt(d_k) for j in seen]
            powers = [math.exp(score - max(scores)) for score in scores]
            total = math.fsum(powers)
            attended += [
                math.fsum(p / total * value[j][c] for p, j in zip(powers, seen, strict=True)) for c in span
            ]
        attended = affine(attended, weights.out, layer.out_bias)
        y = []
        for c in range(d):
            memory = value[t][c]
            for k in range(s.kernel):
                if 0 <= t - past + k < size:
                    memory += taps[c][k] * value[t - past + k][c]
            y.append(x[t][c] + attended[c] + memory)
        hidden = affine(layer_norm(y, layer.feed_forward_norm), weights.up, layer.up_bias)
        added = affine([max(v, 0.0) for v in hidden], weights.down, layer.down_bias)
        out.append([a + b for a, b in zip(y, added, strict=True)])
    return out


@given(
    frames=st.integers(1, 7),
    shift=st.integers(0, 2),
    left=st.integers(-1, 3),
    right=st.integers(-1, 3),
    heads=st.sampled_from([1, 2, 4]),
)
@torch.no_grad()
def test_a_layer_is_its_formula(frames: int, shift: int, left: int, right: int, heads: int) -> None:
    settings = SanmSettings(
        1, width=4, num_layers=1, num_heads=heads, hidden=5, kernel=5, shift=shift, attention_left=left,
        attention_right=right,
    )  # fmt: skip
    model = built(settings, frames + 10 * shift)
    layer, weights = model.layers[0], model.sets[0]
    x = torch.randn(1, frames, 4, dtype=torch.float64)
    expected = torch.tensor(layer_by_loops(layer, weights, x[0].tolist()), dtype=torch.float64)
    is_inside = torch.ones(1, frames, dtype=torch.bool)
    got = layer(x, weights, is_inside[..., None].double(), model._is_seen(is_inside))[0]
    # A norm divides by the deviation, which for 4 random numbers is seldom below 1e-3 of their size: so much
    # is the condition. Fewer than 1,000 roundings lie on the longest way.
    size = 1 + float(expected.abs().max())
    assert float((got - expected).abs().max()) <= 1e3 * gamma(1000, torch.float64) * size


@torch.no_grad()
@pytest.mark.parametrize("sharing", ["all", "cycle"])
def test_an_encoder_uses_the_sets_of_its_map_in_turn(sharing: Sharing) -> None:
    settings = SanmSettings(
        2, width=4, num_layers=3, num_heads=2, hidden=6, kernel=3, sharing=sharing, num_sets=2
    )
    model = built(settings)
    features, lengths = torch.randn(1, 9, MELS, dtype=torch.float64), torch.tensor([9])
    x = model.input_norm(features)
    x = model.norm(model.first(x.transpose(1, 2)).transpose(1, 2)).relu()[0].tolist()
    for layer, index in zip(model.layers, {"all": (0, 0, 0), "cycle": (0, 1, 0)}[sharing], strict=True):
        x = layer_by_loops(layer, model.sets[index], x)
    rows = [affine(layer_norm(row, model.output_norm), model.output.weight, model.output.bias) for row in x]
    expected = torch.tensor(rows, dtype=torch.float64)
    got = model(features, lengths)[0]
    assert got.shape == (5, CLASSES)
    assert float((got - expected).abs().max()) <= 1e4 * gamma(3000, torch.float64) * (
        1 + float(expected.abs().max())
    )


MAPS: list[tuple[Sharing, int, int, tuple[int, ...]]] = [
    ("none", 4, 2, (0, 1, 2, 3)),
    ("all", 4, 2, (0, 0, 0, 0)),
    ("sequence", 6, 3, (0, 0, 1, 1, 2, 2)),
    ("sequence", 5, 2, (0, 0, 0, 1, 1)),
    ("cycle", 6, 3, (0, 1, 2, 0, 1, 2)),
    ("cycle", 5, 2, (0, 1, 0, 1, 0)),
    ("cycle-reversed", 6, 3, (0, 1, 2, 2, 1, 0)),
    ("cycle-reversed", 9, 3, (0, 1, 2, 0, 1, 2, 2, 1, 0)),
    ("cycle-reversed", 5, 3, (0, 1, 2, 1, 0)),
    ("cycle-reversed", 3, 3, (2, 1, 0)),
]


@pytest.mark.parametrize(("sharing", "layers", "sets", "expected"), MAPS)
def test_sharing_maps(sharing: Sharing, layers: int, sets: int, expected: tuple[int, ...]) -> None:
    assert sharing_map(sharing, layers, sets) == expected


@given(
    sharing=st.sampled_from(["sequence", "cycle", "cycle-reversed"]),
    sets=st.integers(1, 6),
    more=st.integers(0, 9),
)
def test_a_map_uses_every_set_about_as_often(sharing: Sharing, sets: int, more: int) -> None:
    found = sharing_map(sharing, sets + more, sets)
    uses = [found.count(one) for one in range(sets)]
    assert min(uses) >= 1
    assert max(uses) - min(uses) <= 1
    settings = SanmSettings(
        width=4, num_layers=sets + more, num_heads=1, hidden=4, sharing=sharing, num_sets=sets
    )
    model = settings.build(4, 3)
    assert [model.num_uses(f"sets.{one}.qkv") for one in range(sets)] == uses
    assert model.num_uses("layers.0.up_bias") == 1


def unshared(shared: SanmEncoder) -> SanmEncoder:
    """The same function, with a copy of its set for each layer."""
    plain = shared.sizes.__class__(**{**vars(shared.sizes), "sharing": "none"}).build(MELS, CLASSES).double()
    state = {}
    for name, value in shared.state_dict().items():
        if not name.startswith("sets."):
            state[name] = value
    for layer, index in enumerate(shared.sizes.sets):
        for name, value in shared.sets[index].state_dict().items():
            state[f"sets.{layer}.{name}"] = value
    plain.load_state_dict(copy.deepcopy(state))
    return plain.eval()


@pytest.mark.parametrize("sharing", ["all", "sequence", "cycle", "cycle-reversed"])
def test_the_gradient_of_a_shared_matrix_is_the_sum_over_its_uses(sharing: Sharing) -> None:
    settings = SanmSettings(
        1,
        width=4,
        num_layers=4,
        num_heads=2,
        hidden=6,
        kernel=3,
        sharing=sharing,
        num_sets=2,
        rank=1,
        adapter=2,
    )
    shared = built(settings)
    plain = unshared(shared)
    features, lengths = torch.randn(2, 6, MELS, dtype=torch.float64), torch.tensor([6, 4])
    outs = [model(features, lengths) for model in (shared, plain)]
    assert torch.equal(*outs)
    for out in outs:
        torch.autograd.backward(out[0].square().sum())
    for index, weights in enumerate(shared.sets):
        for name, parameter in weights.named_parameters():
            uses = [
                plain.sets[layer].get_parameter(name).grad
                for layer, one in enumerate(settings.sets)
                if one == index
            ]
            terms = torch.stack([use for use in uses if use is not None])
            assert len(terms) == len(uses)
            assert parameter.grad is not None
            bound = gamma(100, torch.float64) * terms.abs().amax() * len(uses)
            assert float((parameter.grad - terms.sum(0)).abs().max()) <= bound


def test_without_sharing_each_layer_has_a_set_and_parameters_are_counted_once() -> None:
    plain = SanmSettings(width=8, num_layers=4, num_heads=2, hidden=16).build(MELS, CLASSES)
    shared = SanmSettings(width=8, num_layers=4, num_heads=2, hidden=16, sharing="all").build(MELS, CLASSES)
    assert (len(plain.sets), len(shared.sets)) == (4, 1)
    matrices = 4 * 8 * 8 + 2 * 8 * 16
    assert plain.num_parameters - shared.num_parameters == 3 * matrices


@torch.no_grad()
def test_recovery_terms_change_nothing_before_they_are_trained() -> None:
    torch.manual_seed(0)
    sizes = {"width": 8, "num_layers": 3, "num_heads": 2, "hidden": 12, "sharing": "all"}
    model = SanmSettings(**sizes, rank=2, adapter=3).build(MELS, CLASSES).double().eval()  # type: ignore[arg-type]
    bare = SanmSettings(**sizes).build(MELS, CLASSES).double().eval()  # type: ignore[arg-type]
    bare.load_state_dict({name: model.state_dict()[name] for name in bare.state_dict()})
    features, lengths = torch.randn(1, 12, MELS, dtype=torch.float64), torch.tensor([12])
    assert torch.equal(model(features, lengths), bare(features, lengths))
    for name, parameter in model.named_parameters():
        if "low_rank" in name or "adapter" in name:
            nn.init.normal_(parameter)
    assert not torch.allclose(model(features, lengths), bare(features, lengths))


@torch.no_grad()
def test_a_low_rank_term_is_added_to_the_matrix() -> None:
    settings = SanmSettings(1, width=4, num_layers=2, num_heads=2, hidden=6, kernel=3, sharing="all", rank=2)
    model = built(settings)
    merged = unshared(model)
    for layer, weights in zip(model.layers, merged.sets, strict=True):
        for name, matrix in weights.named_parameters():
            matrix += layer.low_rank.get_parameter(f"{name}_b") @ layer.low_rank.get_parameter(f"{name}_a")
    for layer in merged.layers:
        layer.low_rank = None
    features, lengths = torch.randn(1, 7, MELS, dtype=torch.float64), torch.tensor([7])
    expected = merged(features, lengths)
    difference = float((model(features, lengths) - expected).abs().max())
    assert difference <= 1e4 * gamma(2000, torch.float64) * (1 + float(expected.abs().max()))


@torch.no_grad()
@given(left=st.integers(0, 3), right=st.integers(0, 3), shift=st.integers(0, 2))
def test_a_frame_depends_on_its_context_only(left: int, right: int, shift: int) -> None:
    settings = SanmSettings(
        1, width=4, num_layers=2, num_heads=1, hidden=4, kernel=5, shift=shift, attention_left=left,
        attention_right=right,
    )  # fmt: skip
    model = built(settings)
    features, size = torch.randn(1, 40, MELS, dtype=torch.float64), torch.tensor([40])
    before = 2 * max(left, 2 + shift) + 1
    after = 2 * max(right, 2 - shift) + 1
    changed = features.clone()
    changed[:, 20] += 1.0
    moved = (model(features, size) != model(changed, size)).any(-1)[0].nonzero().flatten()
    assert moved.min() == 20 - after
    assert moved.max() == 20 + before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 10, "num_heads": 4}, "4 heads do not divide a width of 10"),
        ({"kernel": 4}, "the kernel has 4 taps"),
        ({"shift": 6}, "shifted by 6: give 0 to 5"),
        ({"attention_left": -2}, "attention_left is -2"),
        ({"rank": -1}, "the rank is -1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"hidden": 0}, "hidden of a sanm model is 0"),
        ({"sharing": "pairs"}, "sharing is 'pairs'; choose|sharing is 'pairs': choose"),
        ({"sharing": "cycle", "num_sets": 7}, "6 layers share 7 weight sets"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SanmSettings(**settings)  # type: ignore[arg-type]
