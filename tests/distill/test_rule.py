"""What the rules keep, and the targets made of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modicum.distill import Mass, Threshold, TopK, parse_rule
from modicum.distill.essence import Tail
from modicum.errors import InputError
from tests.bounds import assert_within, gamma
from tests.distill import reference

CLASSES = 12
RULES = [
    "topk=1",
    "topk=3",
    f"topk={CLASSES}",
    "threshold=0.05",
    "threshold=1",
    "mass=0.5",
    "mass=0.95",
    "mass=1",
]


def posteriors(seed: int, frames: int = 20, spread: float = 2.0) -> Tensor:
    """[frames, CLASSES] float32; no two alike in a row."""
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(frames, CLASSES, generator=generator)).softmax(-1)


@pytest.mark.parametrize("text", RULES)
def test_a_rule_keeps_what_the_reference_keeps(text: str) -> None:
    name, _, value = text.partition("=")
    for seed in range(5):
        probabilities = posteriors(seed)
        essence = parse_rule(text).select(probabilities)
        for frame, row in enumerate(probabilities.double().tolist()):
            count = int(essence.counts[frame])
            expected = reference.kept(row, name, float(value))
            # The last classes may sum to 1 or not, as float32 rounded the row: then the count is free.
            if text != "mass=1":
                assert count == len(expected)
            assert essence.classes[frame, :count].tolist() == expected[:count]
            assert torch.equal(essence.probabilities[frame, :count], probabilities[frame, expected[:count]])
            assert (essence.classes[frame, count:] == expected[0]).all()
            assert (essence.probabilities[frame, count:] == 0).all()


@given(seed=st.integers(0, 2**31), k=st.integers(1, CLASSES - 1), spread=st.floats(0.1, 6))
def test_mass_grows_with_k_up_to_one(seed: int, k: int, spread: float) -> None:
    probabilities = posteriors(seed, spread=spread)
    fewer, more = (TopK(n).select(probabilities).mass for n in (k, k + 1))
    assert (fewer <= more).all()
    everything = TopK(CLASSES).select(probabilities).mass
    assert_within(everything, torch.ones_like(everything), gamma(CLASSES + 16, torch.float32))


@given(seed=st.integers(0, 2**31), share=st.floats(0.01, 1), spread=st.floats(0.1, 6))
def test_a_mass_is_reached_by_no_smaller_set(seed: int, share: float, spread: float) -> None:
    probabilities = posteriors(seed, spread=spread)
    essence = Mass(share).select(probabilities)
    slack = gamma(CLASSES + 16, torch.float32)
    assert (essence.mass >= share - slack).all()
    for frame, count in enumerate(essence.counts.tolist()):
        assert float(essence.probabilities[frame, : count - 1].double().sum()) < share


@given(seed=st.integers(0, 2**31), least=st.floats(1e-6, 1), spread=st.floats(0.1, 6))
def test_a_threshold_splits_the_classes(seed: int, least: float, spread: float) -> None:
    probabilities = posteriors(seed, spread=spread)
    essence = Threshold(least).select(probabilities)
    for frame, count in enumerate(essence.counts.tolist()):
        chosen = set(essence.classes[frame, :count].tolist())
        assert len(chosen) == count
        inside = {c for c in range(CLASSES) if float(probabilities[frame, c]) >= torch.tensor(least).item()}
        assert chosen == (inside or {int(probabilities[frame].argmax())})


@given(
    seed=st.integers(0, 2**31),
    rule=st.sampled_from(RULES),
    tail=st.sampled_from(["renormalize", "drop", "bin"]),
)
def test_targets_are_distributions(seed: int, rule: str, tail: Tail) -> None:
    essence = parse_rule(rule).select(posteriors(seed))
    target = essence.target(tail)
    total = target.probabilities.double().sum(-1)
    if target.tail is not None:
        total = total + target.tail.double()
        assert (target.tail >= 0).all()
    # Each probability is rounded once more, to float32; all of them sum to 1, but where classes were dropped.
    is_whole = (
        essence.counts < CLASSES if tail == "bin" else torch.full_like(essence.counts, tail == "renormalize")
    )
    one = torch.ones_like(total)
    assert_within(torch.where(is_whole.bool(), total, one), one, gamma(2, torch.float32))
    assert (total <= 1 + gamma(CLASSES + 16, torch.float32)).all()
    if tail != "renormalize":
        assert_within(
            target.probabilities,
            essence.probabilities,
            gamma(CLASSES + 18, torch.float32) * essence.probabilities,
        )


def test_rules_are_read_as_they_are_written() -> None:
    for rule in (TopK(16), Threshold(0.01), Mass(0.95), Mass(0.9999996), Threshold(1 / 3), Mass(1)):
        assert parse_rule(str(rule)) == rule


@given(number=st.floats(0, 1, exclude_min=True))
def test_no_digit_of_a_rule_is_lost(number: float) -> None:
    for rule in (Threshold(number), Mass(number)):
        assert parse_rule(str(rule)) == rule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("topk=0", "k is 0"),
        ("topk=1.5", "'1.5' is not a whole number"),
        ("threshold=0", "the threshold is 0.0"),
        ("mass=1.2", "the mass is 1.2"),
        ("mass=nan", "the mass is nan"),
        ("mass=much", "'much' is not a number"),
        ("best=3", "give topk=16, threshold=0.01 or mass=0.95"),
        ("", "give topk=16"),
    ],
)
def test_bad_rules(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_rule(text)


def test_bad_probabilities_and_tails() -> None:
    probabilities = posteriors(0)
    with pytest.raises(
        InputError, match=f"keeps more classes than the {CLASSES} there are: give k of at most"
    ):
        TopK(CLASSES + 1).select(probabilities)
    with pytest.raises(InputError, match="shape \\[frames, classes\\]"):
        TopK(1).select(probabilities[0])
    with pytest.raises(InputError, match="not numbers"):
        Mass(0.5).select(probabilities * float("nan"))
    with pytest.raises(InputError, match="choose one of renormalize, drop, bin"):
        TopK(1).select(probabilities).target("some")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="frame 1 have probability 0"):
        TopK(1).select(torch.tensor([[1.0, 0.0], [0.0, 0.0]])).target()
