"""The whole path on small models of many families."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modicum.errors import InputError, ModelError
from modicum.weights import layers as budgets
from modicum.weights import packed, save
from modicum.weights import state as state_module
from modicum.weights.blocks import blocks_of
from modicum.weights.pattern import Blocks, Groups, Rows
from modicum.weights.perplexity import perplexity
from modicum.weights.plan import plan
from modicum.weights.prune import PruneReport, prune
from modicum.weights.state import State
from tests.bounds import LAMBDA, exactly, gamma, network_error
from tests.weights.models import FAMILIES, build, ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "how",
    [
        {"sparsity": 0.5, "refine": None},
        {"sparsity": 0.6, "refine": "dsnot"},
        {"pattern": "2:4", "refine": "swap"},
        {"sparsity": 0.5, "method": "sparsegpt", "refine": None},
        {"sparsity": 0.5, "method": "sparsegpt", "refine": None, "update": "lsq"},
        {"sparsity": 0.5, "method": "alps", "refine": None},
        {"pattern": "2:4", "method": "alps", "refine": "swap"},
        {"sparsity": 0.55, "scope": "layer", "refine": "swap", "update": "lsq"},
        {"sparsity": 0.55, "scope": "layer", "refine": "dsnot"},
        {"sparsity": 0.55, "scope": "layer", "method": "sparsegpt", "refine": None},
    ],
    ids=str,
)
def test_what_is_pruned_is_of_the_pattern_and_all_else_stays(family: str, how: dict[str, Any]) -> None:
    model = build(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chosen = plan(**how)
    report = prune(model, ids(), chosen)
    names = [m.name for block in blocks_of(model) for m in block.matrices]
    assert [row.name for row in report.table] == names
    for block in blocks_of(model):
        for matrix in block.matrices:
            base, _, index = matrix.name.partition("[")
            mask = report.masks[base] if not index else report.masks[base][int(index[:-1])]
            assert chosen.pattern.follows(mask)
            assert bool((matrix.weight[~mask] == 0).all())
            if chosen.update == "none":
                dense = before[base] if not index else before[base][int(index[:-1])]
                assert torch.equal(matrix.weight[mask], dense[mask])
    touched = set(report.masks)
    for name, value in model.state_dict().items():
        if name not in touched:
            assert torch.equal(value, before[name])
    for row in report.table:
        if row.error_before is not None and row.error_refined is not None and how.get("refine") == "swap":
            assert (
                row.error_refined <= row.error_before
            )  # a swap lowers it far more than rounding; none is none
    assert math.isfinite(perplexity(model, ids(2, seed=9)))


def test_each_block_sees_the_inputs_that_pruned_blocks_give() -> None:
    """Against hooks on the whole model, block by block."""
    model, whole = build("llama"), build("llama")
    chosen = plan(sparsity=0.5, refine=None)
    prune(model, ids(), chosen)
    for number in range(2):
        norms: dict[str, Tensor] = {}
        hooks = [
            module.register_forward_pre_hook(_adder(norms, name))
            for name, module in nn.Module.named_modules(whole)
            if isinstance(module, nn.Linear) and f"layers.{number}." in name
        ]
        for row in ids():
            whole(row[None])
        for hook in hooks:
            hook.remove()
        for name, norm in norms.items():
            weight = whole.get_submodule(name).weight.data
            score = weight.abs() * norm.sqrt().float()
            mask = Rows(0.5).select(score)
            # Statistics sum in float64, these hooks' inputs went through the model in fp32, and so do scores.
            share = 2 * LAMBDA * network_error(whole, 32) + gamma(4, torch.float32)
            order = score.sort(dim=1).values
            low, high = order[:, Rows(0.5).removed(score.shape[1]) - 1 :].T[:2]
            assert bool((high - low > 2 * share * high).all()), "a choice is nearer than its rounding"
            weight[~mask] = 0
            assert torch.equal(model.get_submodule(name).weight, weight)


def _adder(norms: dict[str, Tensor], name: str) -> Any:
    """A hook that adds up the squares of a layer's inputs."""

    def add(_: nn.Module, args: tuple[Tensor]) -> None:
        squares = args[0].detach().double().square().flatten(0, -2).sum(0)
        norms[name] = norms[name] + squares if name in norms else squares

    return add


@pytest.mark.parametrize("pattern", [Blocks(2, 4, 0.5)], ids=str)
def test_blocks(pattern: Blocks) -> None:
    report = prune(build("llama"), ids(), plan(pattern="2x4", sparsity=0.5, refine="swap"))
    assert all(pattern.follows(mask) for mask in report.masks.values())


@pytest.mark.parametrize("layers", ["owl", "atp"])
def test_layer_budgets_keep_the_whole(layers: str) -> None:
    report = prune(build("llama"), ids(8), plan(sparsity=0.6, refine=None, layers=layers))
    assert sum(report.shares) / 2 == exactly(0.6)
    assert report.achieved == pytest.approx(0.6, abs=1 / 16)  # rows of 16 or 24 lose whole weights


def test_a_block_may_lose_nothing() -> None:
    """OWL moves shares by up to 0.08: of 0.07 the block with more outliers loses none."""
    report = prune(build("llama"), ids(), plan(sparsity=0.07, refine=None, layers="owl"))
    assert min(report.shares) == 0
    blocks = [sum(row.rows * row.width - row.kept for row in report.table if row.block == n) for n in (0, 1)]
    assert min(blocks) == 0 < max(blocks)


def test_owl_and_atp_are_written_as_their_formulas() -> None:
    shares = budgets.owl([0.1, 0.3, 0.2], 0.7)
    assert sum(shares) / 3 == exactly(0.7)
    assert shares[0] > shares[2] > shares[1]
    assert max(shares) - min(shares) == exactly(0.16)
    assert budgets.owl([0.1, 0.1], 0.7) == [0.7, 0.7]
    slopes = budgets.atp(4, 0.7, 0.1)
    assert [b - a for a, b in itertools.pairwise(slopes)] == exactly([0.1] * 3)
    assert sum(slopes) / 4 == exactly(0.7)
    clipped = budgets.spread([1.2, 0.8, -0.3], [10, 30, 20], 0.6)
    assert all(0 <= s <= 0.98 for s in clipped)
    assert sum(n * s for n, s in zip([10, 30, 20], clipped, strict=True)) / 60 == exactly(0.6)
    with pytest.raises(InputError, match=r"above 0\.98"):
        budgets.spread([0.99], [1], 0.99)


def test_atp_is_never_worse_than_uniform_on_its_tuning_text() -> None:
    tuning = ids(8)[:2]
    found = []
    for layers in ("uniform", "atp"):
        model = build("llama")
        shares = prune(model, ids(8), plan(sparsity=0.6, refine=None, layers=layers)).shares
        again = build("llama")
        from modicum.weights import walk as room

        chosen = plan(sparsity=0.6, refine=None)
        passes = room.Passes(again, blocks := blocks_of(again), ids(8)[2:])
        for number, block in enumerate(blocks):
            gathered = room.gather(passes, number, block, chosen)
            for m in block.matrices:
                room.prune_matrix(m, gathered[m.name], chosen, chosen.at(shares[number]), number)
            passes.hidden = passes.through(number)
        found.append(perplexity(again, tuning))
    assert found[1] <= found[0]  # the one it compared, by the same operations


def test_a_bias_can_make_up_for_the_expected_error() -> None:
    how = {"sparsity": 0.6, "refine": "swap", "bias_correct": True}
    model = build("opt")
    dense = build("opt")
    prune(model, ids(), plan(**how))
    fc = "model.decoder.layers.0.fc1"
    assert not torch.equal(model.get_submodule(fc).bias, dense.get_submodule(fc).bias)


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    chosen = plan(sparsity=0.6, refine="dsnot")
    whole = build("opt")
    expected = prune(whole, ids(), chosen)

    def stop(_: str, done: int, __: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    about = {"plan": repr(chosen)}
    with pytest.raises(KeyboardInterrupt):
        prune(build("opt"), ids(), chosen, state=State(tmp_path, about), progress=stop)
    assert len(list(tmp_path.glob("block-*"))) == 1
    model, told = build("opt"), []
    state = State(tmp_path, about)
    report = prune(model, ids(), chosen, state=state, progress=lambda *x: told.append(x))
    for name, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert [r.kept for r in report.table] == [r.kept for r in expected.table]
    with pytest.raises(InputError, match="other settings, text or model"):
        State(tmp_path, {"plan": "other"})
    (tmp_path / "run.json").write_text("{", encoding="utf-8")  # cut short
    with pytest.raises(InputError, match="or remove it to begin anew"):
        State(tmp_path, about)
    state.clear()
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("text", encoding="utf-8")
    with pytest.raises(InputError, match="give a folder that can be written"):
        State(tmp_path / "file" / "state", about)


def test_a_disk_that_is_full_stops_a_run_that_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, real = plan(sparsity=0.6), state_module.save_file

    def full(tensors: object, path: Path, **_: object) -> None:
        if "block-0001" in path.name:
            path.write_bytes(b"half")
            raise OSError("No space left on device")
        real(tensors, path, **_)

    monkeypatch.setattr(state_module, "save_file", full)
    with pytest.raises(ModelError, match=r"No space left .* goes on from the 1 blocks that are done"):
        prune(build("llama"), ids(), chosen, state=State(tmp_path, {}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block-0000.safetensors", "run.json"]
    monkeypatch.undo()
    model, whole = build("llama"), build("llama")
    prune(model, ids(), chosen, state=State(tmp_path, {}))
    prune(whole, ids(), chosen)
    for name, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize("family", ["llama", "mixtral", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_file_comes_back_bit_for_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(family).to(dtype)
    report = prune(model, ids(), plan(sparsity=0.6))
    some = next(iter(report.masks))
    kept = report.masks[some].nonzero()[0]
    model.state_dict()[some][tuple(kept)] = -0.0  # what is kept stays, and its sign
    size = save(report, model, None, tmp_path)
    header, tensors = packed.read(tmp_path)
    found = packed.dense(header, tensors)
    for name, value in model.state_dict().items():
        assert (
            torch.equal(found[name].view(torch.uint8), value.contiguous().view(torch.uint8))
            if value.dim()
            else True
        )
    for name, mask in packed.masks_of(header, tensors).items():
        assert torch.equal(mask, report.masks[name])
    masked = sum(
        packed.bits_and_values(m.flatten(0, -2).shape[0], m.shape[-1], int(m.sum()), dtype.itemsize)
        for m in report.masks.values()
    )
    rest = sum(v.nbytes for n, v in model.state_dict().items() if n not in report.masks)
    assert masked + rest < size < masked + rest + 16_000
    assert (tmp_path / "config.json").is_file()


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_what_came_in_16_bits_stays_in_16_bits(method: str, tmp_path: Path) -> None:
    """Loaded in 32, as a machine without 16-bit units does, moved or not: the file is not twice as large."""
    model, other = build("llama").bfloat16().float(), build("llama").bfloat16()
    sizes = []
    for lm, folder in ((model, tmp_path / "32"), (other, tmp_path / "16")):
        report = prune(lm, ids(), plan(sparsity=0.5, method=method, refine=None))
        sizes.append(save(report, lm, None, folder))
    assert sizes[0] == pytest.approx(sizes[1], abs=200)
    header, tensors = packed.read(tmp_path / "32")
    assert all(value.itemsize <= 2 for value in tensors.values())
    for name, value in packed.dense(header, tensors).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, model.state_dict()[name])


@pytest.mark.parametrize("damage", ["cut", "altered", "format"])
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    model = build("llama")
    report = prune(model, ids(), plan(sparsity=0.5))
    save(report, model, None, tmp_path)
    path = tmp_path / packed.FILE
    raw = bytearray(path.read_bytes())
    if damage == "cut":
        raw = raw[:-100]
    elif damage == "altered":
        raw[-5] ^= 1
    else:
        raw = bytearray(bytes(raw).replace(b'\\"format\\": 1', b'\\"format\\": 9'))
    path.write_bytes(raw)
    with pytest.raises(ModelError):
        packed.read(tmp_path)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    report = prune(model, ids(), plan(sparsity=0.5))

    def full(tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(packed, "save_file", full)
    with pytest.raises(ModelError, match="No space left"):
        save(report, model, None, tmp_path)
    assert not list(tmp_path.glob("*.part"))
    assert not (tmp_path / packed.FILE).exists()


def test_a_packed_layer_computes_what_the_dense_one_does() -> None:
    w = torch.randn(5, 13)
    mask = Rows(0.6).select(w.abs())
    layer = packed.PackedLinear(packed.pack(mask), w[mask], 13, torch.ones(5))
    x = torch.randn(3, 13)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, torch.where(mask, w, 0.0), torch.ones(5)))
    assert torch.equal(packed.unpack(packed.pack(mask), 13), mask)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "wonda"}, "choose one of magnitude"),
        ({"refine": "dsnott"}, "choose one of none"),
        ({"layers": "owls"}, "uniform, owl, atp"),
        ({"scope": "column"}, "choose one of row, layer"),
        (
            {"scope": "layer", "pattern": "2:4", "sparsity": None},
            'give scope="row", or a sparsity without a pattern',
        ),
        ({"sparsity": None}, "nothing says how much to remove"),
        ({"sparsity": None, "pattern": "2:4", "layers": "owl"}, "unequal shares"),
        ({"pattern": "2x2", "refine": "dsnot"}, 'give refine="swap"'),
        ({"bias_correct": True, "refine": "dsnot"}, "expected error zero"),
        ({"sparsity": 1.0}, "below 1"),
    ],
)
def test_plans_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(**{"sparsity": 0.5, **given})


def test_models_and_layers_that_cannot_be_pruned_are_told_by_name() -> None:
    model = build("llama")
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.q_proj\.weight: pattern 5:10"):
        prune(model, ids(), plan(pattern="5:10", refine=None))
    tied = build("llama")
    tied.model.layers[1].mlp.up_proj.weight = tied.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ModelError, match=r"up_proj\.weight is tied to"):
        prune(tied, ids(), plan(sparsity=0.5))
    coded = build("llama")

    class Coded(nn.Linear):
        pass

    coded.model.layers[0].mlp.up_proj.__class__ = Coded
    with pytest.raises(ModelError, match="is a Coded"):
        prune(coded, ids(), plan(sparsity=0.5))
    broken = build("llama")
    broken.model.layers[1].input_layernorm.weight.data[0] = float("nan")
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.q_proj\.weight: its inputs are not finite"):
        prune(broken, ids(), plan(sparsity=0.5))
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=64, n_positions=64))
    with pytest.raises(ModelError, match=r"no torch\.nn\.Linear layers"):
        prune(gpt2, ids(), plan(sparsity=0.5))


def test_an_expert_that_no_token_reached_is_pruned_by_size() -> None:
    model = build("mixtral")
    report: PruneReport = prune(model, ids(1, 2), plan(sparsity=0.5))
    silent = [row for row in report.table if row.tokens == 0]
    assert silent
    dense = copy.deepcopy(build("mixtral")).state_dict()
    for row in silent:
        base, _, index = row.name.partition("[")
        weight = dense[base][int(index[:-1])]
        assert torch.equal(report.masks[base][int(index[:-1])], Rows(0.5).select(weight.abs()))
    assert json.loads(json.dumps(report.to_dict()))["achieved"] == exactly(0.5)


def test_groups_are_kept_by_the_sweep_too() -> None:
    report = prune(build("llama"), ids(), plan(method="sparsegpt", pattern="2:4", refine=None))
    assert all(Groups(2, 4).follows(mask) for mask in report.masks.values())
