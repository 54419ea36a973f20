"""The loss of frames and tokens, and its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from modicum.distill import Essence, SoftTarget, TopK, essence_loss, parse_rule
from modicum.distill.essence import Tail
from modicum.errors import InputError
from tests.bounds import FUNCTION, assert_within, gamma, softmax_bound, unit_roundoff
from tests.distill import reference

FRAMES, CLASSES = 6, 9
F64 = torch.float64


def logits_of(seed: int, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(FRAMES, CLASSES, generator=generator, dtype=F64)


def labels_of(seed: int) -> Tensor:
    return torch.randint(0, CLASSES, (FRAMES,), generator=torch.Generator().manual_seed(seed + 1))


def essence_of(seed: int, rule: str, temperature: float = 1.0) -> Essence:
    return parse_rule(rule).select((logits_of(seed + 2) / temperature).softmax(-1))


def entries(target: SoftTarget, essence: Essence, frame: int) -> dict[int, float]:
    count = int(essence.counts[frame])
    return dict(
        zip(target.classes[frame, :count].tolist(), target.probabilities[frame, :count].tolist(), strict=True)
    )


CASES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "rule": st.sampled_from(["topk=1", "topk=4", f"topk={CLASSES}", "threshold=0.1", "mass=0.9"]),
        "tail": st.sampled_from(["renormalize", "drop", "bin"]),
        "hard_weight": st.sampled_from([0.0, 0.3, 1.0]),
        "temperature": st.sampled_from([1.0, 2.5]),
    }
)


def size_of(logits: Tensor, temperature: float) -> float:
    """What a frame's loss is made of: two log-sum-exps and logits."""
    return float(logits.abs().max() + math.log(CLASSES)) * 4 * max(1.0, temperature)


@given(case=CASES)
def test_the_loss_is_the_references(case: dict) -> None:  # type: ignore[type-arg]
    seed, tail, hard, tau = case["seed"], case["tail"], case["hard_weight"], case["temperature"]
    logits, labels, essence = logits_of(seed), labels_of(seed), essence_of(seed, case["rule"], tau)
    target = essence.target(tail)
    expected = torch.tensor(
        [
            reference.loss(
                row,
                entries(target, essence, frame),
                0.0 if target.tail is None else float(target.tail[frame]),
                int(labels[frame]),
                hard,
                tau,
            )
            for frame, row in enumerate(logits.tolist())
        ],
        dtype=F64,
    )
    for dtype in (F64, torch.float32):
        found = essence_loss(
            logits.to(dtype), target, labels, hard_weight=hard, temperature=tau, reduction="none"
        )
        # The logits' own rounding, the sums', and those of exp, log and division.
        bound = 2 * gamma(2 * CLASSES + 4 * FUNCTION, dtype) * size_of(logits, tau)
        if tail == "bin":  # 1/(share of the others) times the error of a share, which may be small
            bound *= 1 + CLASSES
        assert found.dtype == dtype
        assert_within(found, expected, bound, f"the loss in {dtype}")


@given(case=CASES)
def test_the_gradient_is_that_of_finite_differences(case: dict) -> None:  # type: ignore[type-arg]
    seed, hard, tau = case["seed"], case["hard_weight"], case["temperature"]
    labels, target = labels_of(seed), essence_of(seed, case["rule"], tau).target(case["tail"])

    def loss(z: Tensor) -> Tensor:
        return essence_loss(z, target, labels, hard_weight=hard, temperature=tau, reduction="none")

    logits = logits_of(seed).requires_grad_()
    loss(logits).sum().backward()
    assert logits.grad is not None
    step = 2.0**-14
    with torch.no_grad():
        differences = torch.zeros_like(logits)
        for c in range(CLASSES):
            shift = torch.zeros(CLASSES, dtype=F64)
            shift[c] = step
            differences[:, c] = (loss(logits + shift) - loss(logits - shift)) / (2 * step)
        # A log-sum-exp's third derivative is at most 1; there are up to five of them with weights up to τ².
        truncation = step**2 / 6 * 5 * max(1.0, 1 / tau)
        rounding = 2 * gamma(2 * CLASSES + 4 * FUNCTION, F64) * size_of(logits, tau) * (1 + CLASSES) / step
        assert_within(logits.grad, differences, truncation + rounding, "the gradient")


@given(seed=st.integers(0, 10_000), k=st.integers(1, CLASSES), hard=st.floats(0, 1))
def test_the_gradient_is_softmax_less_the_mixed_target(seed: int, k: int, hard: float) -> None:
    labels, essence = labels_of(seed), essence_of(seed, f"topk={k}")
    target = essence.target()
    expected = torch.tensor(
        [
            reference.gradient(row, entries(target, essence, frame), int(labels[frame]), hard)
            for frame, row in enumerate(logits_of(seed).tolist())
        ],
        dtype=F64,
    )
    for dtype in (F64, torch.float32):
        logits = logits_of(seed).to(dtype).requires_grad_()
        essence_loss(logits, target, labels, hard_weight=hard, reduction="sum").backward()
        assert logits.grad is not None
        logit_error = 2 * unit_roundoff(dtype) * float(logits.detach().abs().max())
        bound = 2 * softmax_bound(CLASSES, dtype, logit_error) + gamma(k + 8, dtype)
        assert_within(logits.grad, expected, bound, f"the gradient in {dtype}")
        # Probabilities less probabilities: each frame's gradient sums to 0.
        assert_within(logits.grad.double().sum(-1), torch.zeros(FRAMES, dtype=F64), CLASSES * bound)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_all_classes_are_hintons_loss(temperature: float) -> None:
    teacher = (logits_of(7) / temperature).softmax(-1)
    target = TopK(CLASSES).select(teacher).target()
    ours, hinton = (logits_of(3).requires_grad_() for _ in range(2))
    essence_loss(ours, target, hard_weight=0, temperature=temperature).backward()
    divergence = nn.KLDivLoss(reduction="batchmean")((hinton / temperature).log_softmax(-1), teacher)
    (temperature**2 * divergence).backward()
    assert ours.grad is not None
    assert hinton.grad is not None
    bound = (
        4
        * temperature
        * softmax_bound(CLASSES, F64, 8 * unit_roundoff(F64) * float(ours.detach().abs().max()))
    )
    assert_within(ours.grad, hinton.grad, bound, "the gradient")
    # The losses differ by the target's entropy, which is constant.
    entropy = -(teacher * teacher.log()).sum(-1).mean()
    with torch.no_grad():
        loss = essence_loss(ours, target, hard_weight=0, temperature=temperature)
    size = size_of(ours.detach(), temperature) * temperature
    assert_within(
        loss, temperature**2 * (divergence + entropy), 4 * gamma(4 * CLASSES + 4 * FUNCTION, F64) * size
    )


def test_one_class_is_training_on_the_teachers_choice() -> None:
    teacher = logits_of(7).softmax(-1)
    target = TopK(1).select(teacher).target()
    assert torch.equal(target.probabilities, torch.ones(FRAMES, 1, dtype=F64))
    ours, hard = (logits_of(3).requires_grad_() for _ in range(2))
    loss = essence_loss(ours, target, hard_weight=0)
    expected = F.cross_entropy(hard, teacher.argmax(-1))
    loss.backward()
    expected.backward()
    bound = 2 * gamma(2 * CLASSES + 4 * FUNCTION, F64)
    assert_within(loss, expected, bound * size_of(ours.detach(), 1))
    assert ours.grad is not None
    assert hard.grad is not None
    assert_within(ours.grad, hard.grad, bound)


def test_hard_weight_one_is_cross_entropy() -> None:
    target, labels, logits = essence_of(1, "topk=3").target(), labels_of(0), logits_of(0)
    bound = 2 * gamma(2 * CLASSES + 4 * FUNCTION, F64) * size_of(logits, 1)
    assert_within(essence_loss(logits, target, labels, hard_weight=1), F.cross_entropy(logits, labels), bound)


@pytest.mark.parametrize("tail", ["renormalize", "bin"])
def test_the_loss_is_least_where_the_student_is_the_teacher(tail: Tail) -> None:
    teacher = logits_of(4).requires_grad_()
    rule = f"topk={CLASSES}" if tail == "renormalize" else "topk=3"
    target = parse_rule(rule).select(teacher.detach().softmax(-1)).target(tail)
    essence_loss(teacher, target, hard_weight=0).backward()
    assert teacher.grad is not None
    bound = (
        softmax_bound(CLASSES, F64, 8 * unit_roundoff(F64) * float(teacher.detach().abs().max())) * CLASSES
    )
    assert_within(teacher.grad, torch.zeros_like(teacher), bound, "the gradient")


def test_shapes_batches_and_reductions() -> None:
    target, labels, logits = essence_of(1, "mass=0.9").target(), labels_of(0), logits_of(0)
    frames = essence_loss(logits, target, labels, reduction="none")
    assert frames.shape == (FRAMES,)
    batched = essence_loss(logits.view(2, 3, CLASSES), target, labels.view(2, 3), reduction="sum")
    assert_within(batched, frames.sum(), gamma(FRAMES, F64) * frames.abs().sum())
    half = logits.to(torch.bfloat16).requires_grad_()
    loss = essence_loss(half, target, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_bad_input() -> None:
    target, logits = essence_of(1, "topk=2").target(), logits_of(0)
    with pytest.raises(InputError, match="logits are of 5 frames and 9 classes, the target of 6 and 9"):
        essence_loss(logits[:5], target, hard_weight=0)
    with pytest.raises(InputError, match="6 frames and 8 classes"):
        essence_loss(logits[:, :8], target, hard_weight=0)
    with pytest.raises(InputError, match=r"hard_weight is 0\.5 and there are no labels"):
        essence_loss(logits, target)
    with pytest.raises(InputError, match="3 labels for 6 frames"):
        essence_loss(logits, target, labels_of(0)[:3])
    with pytest.raises(InputError, match="hard_weight is 2"):
        essence_loss(logits, target, labels_of(0), hard_weight=2)
    with pytest.raises(InputError, match="the temperature is 0"):
        essence_loss(logits, target, labels_of(0), temperature=0)
