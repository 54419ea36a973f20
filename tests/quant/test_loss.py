"""Losses of RSQ training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from modicum.errors import InputError
from modicum.quant import (
    QuantSettings,
    RSQLossSettings,
    calibrate,
    noise_loss,
    quantize_model,
    recorded_outputs,
    rsq_loss,
)
from tests.bounds import exactly


def test_the_loss_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    quantized = {name: torch.randn(2, 3, generator=generator, dtype=torch.float64) for name in "ab"}
    exact = {name: torch.randn(2, 3, generator=generator, dtype=torch.float64) for name in "ab"}
    student, teacher = (torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    noise = 0.0
    for name in "ab":
        pairs = list(zip(quantized[name].flatten().tolist(), exact[name].flatten().tolist(), strict=True))
        noise += math.fsum((a - b) ** 2 for a, b in pairs) / math.fsum(b * b for _, b in pairs)
    divergence = 0.0
    for row, other in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = ([math.exp(z) / math.fsum(map(math.exp, scores)) for z in scores] for scores in (other, row))
        divergence += math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 5
    assert float(noise_loss(quantized, exact)) == exactly(noise)
    settings = RSQLossSettings(noise=0.3, distillation=2.0)
    loss = rsq_loss(torch.tensor(1.5, dtype=torch.float64), (quantized, exact), (student, teacher), settings)
    assert float(loss) == exactly(1.5 + 0.3 * noise + 2 * divergence, 300)


def test_training_with_it_brings_a_model_nearer_to_the_float_one() -> None:
    torch.manual_seed(0)
    exact = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 5, 3, padding=1))
    quant = quantize_model(
        nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 5, 3, padding=1)),
        QuantSettings("rsq"),
    )
    quant.load_state_dict(
        {k: v + 0.1 * torch.randn_like(v) for k, v in exact.state_dict().items()}, strict=False
    )
    x = torch.randn(4, 4, 30)
    calibrate(quant, [x])
    names = ["0", "2"]
    optimizer = torch.optim.Adam(quant.parameters(), 2e-3)
    losses = []
    for _ in range(40):
        with recorded_outputs(quant, names) as ours, recorded_outputs(exact, names) as theirs:
            logits = quant(x).mT, exact(x).mT
        loss = rsq_loss(torch.zeros(()), (ours, theirs), logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert all(parameter.grad is None for parameter in exact.parameters())


def test_bad_losses() -> None:
    with pytest.raises(InputError, match="give weights of at least 0"):
        RSQLossSettings(noise=-1)
    with pytest.raises(InputError, match="give weights of at least 0"):
        RSQLossSettings(distillation=math.nan)
    with pytest.raises(InputError, match="give the same ones"):
        noise_loss({"a": torch.ones(1)}, {"b": torch.ones(1)})
    with (
        pytest.raises(InputError, match="no layer 'missing'"),
        recorded_outputs(nn.Linear(1, 1), ["missing"]),
    ):
        pass
