"""2:4 products: what is 2:4 is found, the rest stays dense, and a machine without them says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import modicum
from modicum.errors import ModelError
from modicum.weights import save, semi
from modicum.weights.plan import plan
from modicum.weights.prune import prune
from tests.bounds import assert_same_logits
from tests.tiny_model import TINY_MODEL
from tests.weights.models import build, ids


def pruned() -> nn.Module:
    model = build("llama")
    prune(model, ids(), plan(pattern="2:4", refine=None))
    model.model.layers[0].mlp.up_proj.weight.data.fill_(1.0)  # one that is not
    return model


def test_only_2_of_4_is_2_of_4() -> None:
    assert semi.is_2_of_4(torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 3]]))
    assert not semi.is_2_of_4(torch.tensor([[1.0, 0, 2, 3, 0, 0, 0, 3]]))
    assert not semi.is_2_of_4(torch.zeros(2, 6))


def test_layers_that_are_2_of_4_are_changed_and_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own conversion needs a GPU: here it is seen which weights would go to it."""
    model = pruned()
    seen: list[Tensor] = []

    def convert(weight: Tensor) -> Tensor:
        seen.append(weight)
        return weight.clone()

    monkeypatch.setattr(semi, "_refused", lambda *_: None)
    monkeypatch.setattr(semi, "to_sparse_semi_structured", convert)
    before = model.model.layers[0].mlp.up_proj.weight
    assert semi.convert(model) == len(seen) == 2 * 7 - 1
    assert model.model.layers[0].mlp.up_proj.weight is before


def test_without_such_a_gpu_a_model_stays_dense_and_says_so(tmp_path: Path) -> None:
    model, tokenizer = modicum.load(TINY_MODEL)
    report = modicum.prune(
        model, torch.randint(0, 100, (2, 16)), pattern="2:4", refine=None, method="magnitude"
    )
    save(report, model, tokenizer, tmp_path)
    with pytest.warns(UserWarning, match="weights stay dense: cpu has no 2:4 products"):
        again, _ = modicum.load(tmp_path, weights="2:4", device="cpu")
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_forms_that_are_not_there_are_refused() -> None:
    with pytest.raises(ModelError, match="use 'auto', 'dense', 'packed' or '2:4'"):
        modicum.load(TINY_MODEL, weights="sparse")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="is not packed: make it so with modicum prune"):
        modicum.load(TINY_MODEL, weights="packed")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_products_on_a_gpu_are_those_of_dense_weights() -> None:
    torch.manual_seed(0)
    model, _ = modicum.load("reference", device="cuda", dtype="bfloat16")
    tokens = ids().cuda()
    prune(model, tokens, plan(pattern="2:4", refine=None))
    with torch.no_grad():
        dense = model(tokens).logits
        assert semi.convert(model) > 0
        assert_same_logits(model, model(tokens).logits, dense)
