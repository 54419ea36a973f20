"""Error bounds from which the tolerances of the tests follow.

A bound here is unit roundoff × number of rounded operations × size of the operands (or condition of the
problem). Bounds of this kind hold for any order of summation, with or without fused multiply-add, and so on
any processor, instruction set, kernel and number of threads. Sources:

- N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, SIAM 2002: chapter 3 (sums and
  products), chapter 10 (Cholesky). Worst case.
- N. J. Higham and T. Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput.
  41(5), 2019, and "Sharper probabilistic backward error analysis for basic linear algebra kernels with random
  data", 42(5), 2020. For long chains and random data, where the worst case would let real faults pass.

A bound is for one computed value beside an exact one. Two computed values differ by at most twice as much.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor, nn

FUNCTION = 8
"""Roundings that stand for one call of exp, log, tanh, sqrt or a division: 4 units in the last place, what
vector math libraries (SLEEF, MKL VML, CUDA) promise for their least accurate variant."""

LAMBDA = 8
"""λ of the probabilistic bounds: each holds with a probability of at least 1 - 2·exp(-λ²/2) = 1 - 3e-14, and
the tests compare fewer than 1e9 numbers."""

Size = float | Tensor


def unit_roundoff(dtype: torch.dtype) -> float:
    """u: the largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def gamma(operations: float, dtype: torch.dtype) -> float:
    """γ_k = k·u / (1 - k·u): the relative error of k successive roundings (Higham, lemma 3.1)."""
    share = operations * unit_roundoff(dtype)
    assert share < 0.5, f"{operations} operations in {dtype}: the bound says nothing"
    return share / (1 - share)


def underflow(dtype: torch.dtype) -> float:
    """The absolute error of a number too small for the dtype, which may become zero."""
    return torch.finfo(dtype).tiny


def sum_bound(terms: int, dtype: torch.dtype, magnitude: Size) -> Size:
    """Error of a sum, in any order (Higham, section 4.2). magnitude: the sum of absolute values."""
    return gamma(terms, dtype) * magnitude


def dot_bound(length: int, dtype: torch.dtype, a_norm: Size, b_norm: Size, random: bool = False) -> Size:
    """Error of a dot product: γ_n·‖a‖·‖b‖ (Higham, eq. 3.5, with Cauchy-Schwarz).

    random: the entries of a or b were drawn independently with mean zero, so that partial sums grow like the
    square root of their number: λ·u·‖a‖·‖b‖, whatever the length (Higham and Mary 2020, theorem 4.4).
    """
    share = gamma(min(length, LAMBDA) if random else length, dtype)
    return share * a_norm * b_norm


def logit_bound(
    dtype: torch.dtype, query: Tensor, keys: Tensor, scaling: float, softcap: float | None = None
) -> float:
    """Absolute error of the attention logits scaling · q·k (or their soft-capped values) of random vectors.

    query [..., D] and keys [..., D]: the bound is for the longest of them. Scaling rounds once more, and the
    argument of the exponential is rounded in kernels that use exp2. Soft-capping does not enlarge the error
    of its argument (its slope is at most 1), but its own result, of size `softcap`, is rounded.
    """
    longest = [float(x.double().nan_to_num().norm(dim=-1).max()) if x.numel() else 0.0 for x in (query, keys)]
    error = float(dot_bound(query.shape[-1], dtype, *longest, random=True)) * abs(scaling)
    size = longest[0] * longest[1] * abs(scaling)
    if softcap is not None:
        size = min(size, softcap)
    return error + gamma(2 if softcap is None else 2 + FUNCTION, dtype) * size


def softmax_bound(terms: int, dtype: torch.dtype, logit_error: float) -> float:
    """Relative error of a softmax weight: e^{2δ} for logits that are off by δ, the sum, and exp itself."""
    return math.expm1(2 * logit_error) + gamma(terms + 4 * FUNCTION, dtype)


def lse_bound(terms: int, dtype: torch.dtype, logit_error: float, lse: Size) -> Size:
    """Absolute error of a log-sum-exp. lse: its value."""
    size = lse.abs() if isinstance(lse, Tensor) else abs(lse)
    return logit_error + gamma(terms + 4 * FUNCTION, dtype) * (1 + size)


def attention_bound(
    terms: int, dtype: torch.dtype, logit_error: float, value: Size, stored: torch.dtype | None = None
) -> Size:
    """Absolute error of attention's output: Σ weight · value.

    Args:
        terms: tokens attended to.
        dtype: in which sums are accumulated.
        value: the largest absolute value attended to (per output or overall).
        stored: the dtype to which weights and output are rounded; None: `dtype`. Three roundings: of the
            weights, of the output, and of an output part that is joined with another.
    """
    weights = softmax_bound(terms, dtype, logit_error) + gamma(terms + 4 * FUNCTION, dtype)
    return (weights + gamma(3, stored or dtype)) * value


def solve_bound(size: int, dtype: torch.dtype, condition: float) -> float:
    """Relative error (2-norm) of a solution by Cholesky factors, or by LU of a positive definite matrix.

    Higham, theorem 10.4: |ΔA| ≤ γ_{3n+1}·|Rᵀ||R|, of norm at most n·γ_{3n+1}·‖A‖; times the condition number.
    """
    error = size * gamma(3 * size + 1, dtype) * condition
    assert error < 0.1, f"condition {condition:.3g}: the bound says nothing"
    return error / (1 - error)


def quadratic_bound(vector: Tensor, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Error of e G eᵀ for each row e [..., d]; G [d, d]: γ_{2d+2}·|e||G||e|ᵀ."""
    e, g = vector.double().abs(), matrix.double().abs()
    found: Tensor = gamma(2 * matrix.shape[0] + 2, dtype) * ((e @ g) * e).sum(-1)
    return found


def exactly(expected: Any, operations: int = 100) -> Any:
    """`pytest.approx` for numbers that take at most so many operations in float64, without cancellation."""
    return pytest.approx(expected, rel=gamma(operations, torch.float64), abs=gamma(operations, torch.float64))


def worst(found: Tensor, expected: Tensor, bound: Size) -> float:
    """The largest error as a share of its bound; infinite where one is a number and the other is not.

    Infinities must be equal. Zero of zero is zero: a bound of zero asks for equality.
    """
    a, b = found.detach().double().cpu(), expected.detach().double().cpu()
    assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
    limit = torch.as_tensor(bound).double().cpu().expand(a.shape)
    error = torch.where(a == b, 0.0, (a - b).abs())
    share = torch.where(error == 0, 0.0, error / limit).nan_to_num(nan=math.inf, posinf=math.inf)
    return float(share.max()) if share.numel() else 0.0


def assert_within(found: Tensor, expected: Tensor, bound: Size, what: str = "the result") -> None:
    """|found - expected| ≤ bound everywhere; `bound` is a number or broadcasts to the shape."""
    share = worst(found, expected, bound)
    assert share <= 1, f"{what} is off by {share:.3g} times its error bound"


@dataclass
class Clear:
    """Watches the decisions of a reference: each must be clearer than the error of what is compared.

    Two correct implementations may decide differently where two candidates are as near as their errors. A
    test that compares decisions asserts `least > 1` for its inputs, so that to agree is no luck.
    """

    least: float = math.inf
    """The smallest gap between two candidates, as a share of its error bound."""

    def note(self, gap: float, bound: float) -> None:
        """gap: between the chosen and the next candidate, or a number's distance from its threshold."""
        self.least = min(self.least, abs(gap) / bound if bound else math.inf)

    def note_best(self, candidates: Iterable[float], share: float, size: float | None = None) -> None:
        """The best of candidates whose errors are `share` of the two best ones' size, or of `size`."""
        best = sorted(candidates)[:2]
        if len(best) == 2 and math.isfinite(best[1]):
            self.note(best[1] - best[0], 2 * share * (max(map(abs, best)) if size is None else size))


# -- whole models ------------------------------------------------------------------------------------------

ROUNDINGS = 24
"""Roundings to the stored dtype on the way through one layer: two norms of 3, four projections before and
after attention, rotary's 3, attention's 3, the gate, its product, two residual sums, and some to spare."""

_conditions: WeakKeyDictionary[nn.Module, list[float]] = WeakKeyDictionary()


def network_error(model: Any, tokens: int, turned: bool = False, dtype: torch.dtype | None = None) -> float:
    """Root mean square error of a decoder's logits, as a share of their own root mean square.

    In each layer the longest chain of k rounded operations (dot products over hidden, head and feed-forward
    sizes and over the tokens attended to) makes a relative error of √k·u, and the r roundings to the stored
    dtype one of √r·u' (Higham and Mary 2019 without their factor λ). The layers amplify it by `conditions`.

    Products accumulate in fp32, or in the model's dtype where that is wider.

    Args:
        tokens: attended to at most.
        turned: whether keys are turned back and to their ranks (positions="renumbered"): the angle of
            position p is off by p·u radians, each of three times.
        dtype: in which it is computed; None: the model's.
    """
    config = model.config.get_text_config()
    stored = model.dtype if dtype is None else dtype
    wide = torch.promote_types(stored, torch.float32)
    hidden = config.hidden_size
    feed_forward = getattr(config, "intermediate_size", None) or 4 * hidden
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    chain = 4 * hidden + feed_forward + head + 2 * tokens + 8 * FUNCTION
    angle = 3 * tokens * unit_roundoff(wide) if turned else 0.0
    layer = math.hypot(_probable(chain, wide), _probable(ROUNDINGS, stored), angle)
    top = math.hypot(_probable(2 * hidden + FUNCTION, wide), _probable(4, stored))
    return math.hypot(top, *(layer * condition for condition in conditions(model)))


def _probable(operations: int, dtype: torch.dtype) -> float:
    return math.sqrt(operations) * unit_roundoff(dtype)


def logits_bound(model: Any, logits: Tensor, tokens: int | None = None, turned: bool = False) -> float:
    """Absolute difference that two routes to these logits [..., N, V] may have at one of them.

    λ times the root mean square error of each. tokens: attended to at most; None: as many as there are.
    """
    size = float(logits.detach().double().square().mean().sqrt())
    return 2 * LAMBDA * network_error(model, tokens or logits.shape[-2], turned) * size


def assert_same_logits(
    model: Any, found: Tensor, expected: Tensor, tokens: int | None = None, turned: bool = False
) -> None:
    """Two routes to the same logits [..., N, V] of one model agree to their rounding."""
    if expected.numel():
        assert_within(found, expected, logits_bound(model, expected, tokens, turned), "logits")


def clear_margin(model: Any, tokens: int, turned: bool = False) -> float:
    """The relative gap between two scores above which two routes through a model must choose alike.

    Scores are off by the root mean square error of what they are made of, on each route. Four times that:
    about one decision in ten thousand is as near, and of those fewer than one in ten thousand goes wrong.
    """
    return 2 * 4 * network_error(model, tokens, turned)


def assert_same_tokens(
    model: Any, ids: Tensor, found: Tensor, expected: Tensor, mask: Tensor | None = None
) -> None:
    """Two routes generate the same tokens [B, N] after ids [B, M], greedily, with all in sight.

    Where a row parts, its two best logits must have been nearer to each other than their errors: then either
    token is right, and what follows is not compared.
    """
    if torch.equal(found, expected):
        return
    assert found.shape == expected.shape
    whole, start = torch.cat([ids, expected], 1), ids.shape[1] - 1
    more: dict[str, Tensor] = {}
    if mask is not None:
        there = torch.cat([mask, torch.ones_like(expected)], 1)
        more = {"attention_mask": there, "position_ids": (there.cumsum(1) - 1).clamp_min(0)}
    with torch.no_grad():
        logits = model(whole, use_cache=False, **more).logits[:, start:-1]
    best = logits.topk(2).values
    for row in range(len(ids)):
        apart = (found[row] != expected[row]).nonzero()
        if len(apart):
            first = int(apart[0])
            gap = float(best[row, first, 0] - best[row, first, 1])
            bound = 2 * logits_bound(model, logits, whole.shape[1])
            assert gap <= bound, f"row {row} parts at token {first}, which leads by {gap / bound:.3g} bounds"


def conditions(model: Any) -> list[float]:
    """For each layer, the relative change of the logits per relative change of its input or output, whichever
    is larger; both as root mean squares.

    Measured by finite differences in float64 over 8 rows of random tokens and directions: the largest.
    """
    if model not in _conditions:
        _conditions[model] = _measured(model)
    return _conditions[model]


def _measured(model: Any, step: float = 1e-4) -> list[float]:
    exact = copy.deepcopy(model).double().eval()
    layers = next(m for m in exact.get_decoder().modules() if isinstance(m, nn.ModuleList))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, exact.config.get_text_config().vocab_size, (8, 24), generator=generator)

    def disturbed(state: Tensor) -> Tensor:
        noise = torch.randn(state.shape, generator=generator, dtype=state.dtype)
        return state + step * noise * state.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)

    def disturb(_: nn.Module, __: Any, out: Any) -> Any:
        return disturbed(out) if isinstance(out, Tensor) else (disturbed(out[0]), *out[1:])

    with torch.no_grad():
        plain = exact(ids, use_cache=False).logits
        changes = []
        for module in (exact.get_input_embeddings(), *layers):
            hook = module.register_forward_hook(disturb)
            moved = exact(ids, use_cache=False).logits
            hook.remove()
            change = (moved - plain).square().mean((1, 2)).sqrt() / plain.square().mean((1, 2)).sqrt()
            changes.append(max(1.0, float(change.max()) / step))
    return [max(pair) for pair in pairwise(changes)]
