"""Codes of probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modicum.distill import ProbabilityCode
from modicum.errors import InputError
from tests.bounds import unit_roundoff

U = unit_roundoff(torch.float32)


@pytest.mark.parametrize("bits", [8, 16])
def test_every_code_comes_back_and_they_rise(bits: int) -> None:
    code = ProbabilityCode(bits)
    every = np.arange(2**bits).astype(np.uint8 if bits == 8 else np.uint16)
    values = code.decode(every)
    assert np.array_equal(code.encode(values), every)
    assert (np.diff(values) > 0).all()
    assert values[0] == 0
    assert values[-1] == 1


@given(p=st.floats(0, 1), bits=st.sampled_from([8, 16]))
def test_a_probability_comes_back_to_within_the_bound(p: float, bits: int) -> None:
    code = ProbabilityCode(bits)
    found = float(code.decode(code.encode(np.array([p])))[0])
    assert abs(found - p) <= code.error(p) * (1 + 1e-9) + U * found


def test_other_bits_are_refused() -> None:
    with pytest.raises(InputError, match="in 12 bits is not known; give 8 or 16"):
        ProbabilityCode(12)
