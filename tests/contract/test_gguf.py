"""What transformers makes of GGUF files: the weights that were written, whatever its release."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import modicum
from tests import gguf_models

pytest.importorskip("gguf")
pytest.importorskip("accelerate")


@pytest.mark.parametrize("quantised", [False, True], ids=["float32", "Q8_0"])
@pytest.mark.parametrize("tokenizer", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_logits_are_those_of_the_weights_written(
    kind: str, tokenizer: str, quantised: bool, tmp_path: Path
) -> None:
    """Equal to the last bit: the same float32 weights through the same code. Query and key rows of a llama
    are stored in another order, and matrices in another precision, so both ways back are in this."""
    size = len(gguf_models.tokens(tokenizer))
    model = gguf_models.build(kind, size)
    if quantised:
        gguf_models.round_to_q8(model)
    path = tmp_path / "model.gguf"
    gguf_models.write(path, model, kind, tokenizer=tokenizer, quantised=quantised)
    loaded, words = modicum.load(path, device="cpu")
    ids = torch.randint(size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.dtype == torch.float32
    assert not loaded.training
    assert loaded.generation_config.eos_token_id == 2
    special = (words.bos_token_id, words.eos_token_id, words.unk_token_id, words.pad_token_id)
    assert special == (1, 2, 0, 2)
    assert words.chat_template == gguf_models.TEMPLATE
    hello = words("hello", add_special_tokens=False)["input_ids"]
    assert [words.convert_ids_to_tokens(i).lstrip("▁") for i in hello] == ["hello"]
