"""Decode attention against loops in float64, the Triton kernel and its twin alike."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():  # before Triton is imported, which reads it then
    os.environ["TRITON_INTERPRET"] = "1"

import importlib
import subprocess
import sys
from dataclasses import dataclass, field, replace
from math import exp, inf, log, nan, tanh

import pytest
from torch import Tensor

pytest.importorskip("triton")

from modicum.errors import InputError
from modicum.kernels import decode_twin as twin
from modicum.kv.codec import Codec
from tests.bounds import (
    assert_within,
    attention_bound,
    dot_bound,
    gamma,
    logit_bound,
    lse_bound,
    softmax_bound,
    underflow,
)

kernel = importlib.import_module("modicum.kernels.decode")  # the package has a function of that name
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = kernel.Config(block=16, warps=4, stages=2, splits=3)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy


@pytest.fixture(autouse=True)
def _fresh() -> None:
    print(f"torch.manual_seed({torch.seed()})")  # new numbers in each run; shown where a test fails


@dataclass
class Case:
    """Inputs, and what the reference needs of them: the numbers that the slots stand for."""

    query: Tensor
    keys: Tensor
    values: Tensor
    count: Tensor | None
    scaling: float = 0.25
    form: str = "model"
    options: dict[str, object] = field(default_factory=dict)


@dataclass
class Wanted:
    out: Tensor
    lse: Tensor
    logits: Tensor
    weights: Tensor
    dots: Tensor


def case(
    g: int = 2,
    s: int = 33,
    dk: int = 16,
    dv: int = 16,
    dtype: torch.dtype = torch.float32,
    form: str = "model",
    ragged: bool = True,
    b: int = 2,
    h: int = 2,
    **options: object,
) -> Case:
    """Fresh numbers; slots past a head's count hold what is no number, and one head holds nothing."""
    query = torch.randn(b, h, g, dk).to(dtype)
    wide = torch.randn(b, s + 2, h, dk), torch.randn(b, s + 2, h, dv)
    keys, values = (x.transpose(1, 2)[:, :, 1 : s + 1].to(dtype) for x in wide)  # not contiguous
    count = None
    if ragged:
        count = torch.randint(0, s + 1, (b, h), dtype=torch.int32)
        count[0, 0], count[-1, -1] = s, 0
        if form == "model":
            past = (torch.arange(s) >= count[..., None])[..., None]
            keys, values = keys.masked_fill(past, nan), values.masked_fill(past, nan)
    codec = Codec(form)
    return Case(query, codec.encode(keys), codec.encode(values), count, form=form, options=options)


def probe(c: Case) -> Tensor:
    return torch.randn(*c.query.shape[:2], c.query.shape[-1]) * 3


def virtual(c: Case, number: list[list[float]]) -> tuple[Tensor, Tensor, Tensor]:
    b, h, _, dk = c.query.shape
    dv = c.values.shape[-1] - (0 if c.form == "model" else 2)
    return torch.randn(b, h, dk), torch.randn(b, h, dv), torch.tensor(number)


def wanted(c: Case) -> Wanted:
    """One head, one query, one slot at a time."""
    b, h, g, _ = c.query.shape
    codec = Codec(c.form)
    keys, values = (codec.decode(x, torch.float64).double() for x in (c.keys, c.values))
    s, dv = keys.shape[2], values.shape[-1]
    cap, probes, more = (c.options.get(name) for name in ("softcap", "probe", "virtual"))
    out, lse = torch.zeros(b, h, g, dv).double(), torch.full((b, h, g), -inf).double()
    logits = torch.full((b, h, g, s), -inf).double()
    weights, dots = torch.zeros(b, h, g, s).double(), torch.zeros(b, h, s).double()
    for row in range(b):
        for head in range(h):
            held = s if c.count is None else int(c.count[row, head])
            for j in range(held):
                if probes is not None:
                    dots[row, head, j] = probes[row, head].double() @ keys[row, head, j]
            for member in range(g):
                query = c.query[row, head, member].double()
                slots = [(keys[row, head, j], values[row, head, j], 0.0) for j in range(held)]
                if more is not None and more[2][row, head] != 0:
                    slots.append(
                        (more[0][row, head].double(), more[1][row, head].double(), log(more[2][row, head]))
                    )
                mass, total = 0.0, torch.zeros(dv).double()
                found = []
                for key, value, raised in slots:
                    z = float(query @ key) * c.scaling
                    if cap is not None:
                        z = cap * tanh(z / cap)
                    found.append(z)
                    mass += exp(z + raised)
                    total += exp(z + raised) * value
                for j in range(held):
                    logits[row, head, member, j] = found[j]
                    weights[row, head, member, j] = exp(found[j]) / mass
                if slots:
                    out[row, head, member], lse[row, head, member] = total / mass, log(mass)
    return Wanted(out, lse, logits, weights, dots)


@dataclass
class Bounds:
    """Error bounds of a case: of any logit, output, and dot (per key), and of weights as a share of them.

    Sums are in fp32 (float64 for such queries), of the very numbers that the slots stand for. In half
    precision weights and outputs are rounded to it.
    """

    logit: float
    out: float
    weight: float
    dots: Tensor
    terms: int
    wide: torch.dtype

    @classmethod
    def of(cls, c: Case) -> Bounds:
        codec, wide = Codec(c.form), torch.promote_types(c.query.dtype, torch.float32)
        keys, values = (codec.decode(x, torch.float64).double().nan_to_num() for x in (c.keys, c.values))
        cap, more = c.options.get("softcap"), c.options.get("virtual")
        logit, size = logit_bound(wide, c.query, keys, c.scaling, cap), float(values.abs().max())
        terms = keys.shape[2]
        if more is not None:  # its logit is raised by log n, which is rounded too
            raised = float(more[2].clamp_min(1).log().max())
            logit = max(logit, logit_bound(wide, c.query, more[0], c.scaling, cap) + gamma(2, wide) * raised)
            size, terms = max(size, float(more[1].abs().max())), terms + 1
        out = attention_bound(terms, wide, logit, size, c.query.dtype)
        probe, dots = c.options.get("probe"), torch.zeros(())
        if probe is not None:  # a kernel may split it into three parts of 8 bits: each joins with a rounding
            norms = probe.double().norm(dim=-1)[..., None], keys.norm(dim=-1)
            dots = dot_bound(keys.shape[-1], wide, *norms, random=True) + gamma(4, wide) * norms[0] * norms[1]
        # The reference itself is in float64.
        twice = 2 if wide == torch.float64 else 1
        weight = softmax_bound(terms, wide, logit) + gamma(c.query.shape[2], wide)
        return cls(twice * logit, twice * out, twice * weight, twice * dots, terms, wide)

    def lse(self, expected: Tensor) -> Tensor:
        return lse_bound(self.terms, self.wide, self.logit, expected.masked_fill(expected == -inf, 0.0))


def moved(x: object) -> object:
    if isinstance(x, tuple):
        return tuple(moved(part) for part in x)
    return x.to(DEVICE) if isinstance(x, Tensor) else x


def moved_all(options: dict[str, object]) -> dict[str, object]:
    return {name: moved(x) for name, x in options.items()}


def compare(found: kernel.Decoded, c: Case, expected: Wanted, who: str) -> None:
    dtype, bounds = c.query.dtype, Bounds.of(c)
    assert found.out.dtype == dtype
    assert found.lse.dtype == torch.promote_types(dtype, torch.float32)
    assert_within(found.out, expected.out, bounds.out, f"{who}: out")
    assert_within(found.lse, expected.lse, bounds.lse(expected.lse), f"{who}: lse")
    assert (found.logits is not None) == bool(c.options.get("logits"))
    assert (found.row is not None) == (c.options.get("row") is not None)
    assert (found.dots is not None) == (c.options.get("probe") is not None)
    if found.logits is not None:
        assert_within(found.logits, expected.logits, bounds.logit, f"{who}: logits")
    if found.row is not None:
        w = expected.weights
        w = w.mean(2) if c.options["row"] == "mean" else w.amax(2)
        assert_within(found.row, w, bounds.weight * w + underflow(bounds.wide), f"{who}: row")
    if found.dots is not None:
        past = expected.dots == 0
        assert_within(found.dots, expected.dots, bounds.dots, f"{who}: dots")
        assert not found.dots.cpu()[past].any(), f"{who}: dots past a count"


def check(c: Case, config: kernel.Config | None = SMALL) -> None:
    expected = wanted(c)
    inputs = [moved(x) for x in (c.query, c.keys, c.values, c.count)]
    options = moved_all(c.options)
    compare(twin.decode(*inputs, c.scaling, form=c.form, **options), c, expected, "twin")
    found = kernel.decode(*inputs, c.scaling, form=c.form, config=config, **options)
    compare(found, c, expected, "kernel")


@pytest.mark.parametrize(
    ("g", "s", "dk", "dv"),
    [(1, 1, 16, 16), (2, 5, 48, 32), (3, 33, 64, 64), (4, 70, 128, 128), (8, 300, 16, 48), (17, 20, 80, 16)],
)
@pytest.mark.parametrize("ragged", [False, True])
def test_groups_lengths_and_head_sizes(g: int, s: int, dk: int, dv: int, ragged: bool) -> None:
    check(case(g, s, dk, dv, ragged=ragged, b=1 if s > 100 else 2, logits=True, row="mean"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("g", "dk", "dv"), [(1, 64, 64), (4, 48, 80)])
def test_half_precision(dtype: torch.dtype, g: int, dk: int, dv: int) -> None:
    check(case(g, 40, dk, dv, dtype, logits=True, row="max"))


@pytest.mark.parametrize("s", [1, 33, 70])
def test_the_sizes_that_are_chosen(s: int) -> None:
    check(case(2, s, 32, 32), config=None)


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_any_number_of_splits(splits: int) -> None:
    check(case(2, 75, logits=True, row="mean"), replace(SMALL, splits=splits))


def test_soft_capped() -> None:
    c = case(3, 33, softcap=1.5, logits=True, row="max")
    c.query *= 8  # so that the cap bites
    assert float(wanted(c).logits.max()) > 1.45
    check(c)


@pytest.mark.parametrize("row", ["mean", "max"])
def test_virtual_token(row: str) -> None:
    c = case(3, 33, 48, 32, row=row, logits=True)
    # The last head holds nothing but the virtual token; two heads have let nothing go.
    check(replace(c, options={**c.options, "virtual": virtual(c, [[0.0, 7.0], [0.0, 300.0]])}))
    check(replace(c, options={**c.options, "virtual": virtual(c, [[9.0, 1.0], [2.0, 0.0]]), "softcap": 2.0}))


def test_virtual_token_beside_a_group_of_one() -> None:
    c = case(1, 20, dtype=torch.bfloat16)
    check(replace(c, options={"virtual": virtual(c, [[3.0, 0.0], [5.0, 4.0]])}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("g", [1, 4, 14])  # with three rows of a probe: tiles of 16, 16 and 32
def test_dots_of_a_probe(dtype: torch.dtype, g: int) -> None:
    c = case(g, 33, 48, 16, dtype)
    check(replace(c, options={"probe": probe(c)}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_probe_keeps_its_24_bits(dtype: torch.dtype) -> None:
    """The worst for a sum of two numbers in bf16: what each leaves is nearly half of its last digit."""
    c = case(2, 5, 32, 16, dtype, ragged=False)
    c.keys = torch.ones_like(c.keys)
    c.options["probe"] = torch.full((2, 2, 32), 1 + 1.75 * 2**-9 + 0.9 * 2**-17)
    expected = wanted(c).dots
    found = kernel.decode(*(moved(x) for x in (c.query, c.keys, c.values)), None, 1.0, **moved_all(c.options))
    # All terms are positive: of two parts in bf16 the sum would be off by 32 · 0.9 · 2⁻¹⁷, 4 times as much.
    assert_within(found.dots, expected, gamma(32, torch.float32) * expected, "dots")


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_dots_of_a_probe_beyond_the_range_of_fp16(size: float) -> None:
    c = case(2, 20, 32, 16, torch.float16)
    c.options["probe"] = probe(c) * size
    expected = wanted(c)
    inputs = [moved(x) for x in (c.query, c.keys, c.values, c.count)]
    found = kernel.decode(*inputs, c.scaling, probe=moved(c.options["probe"]), config=SMALL)
    bounds = Bounds.of(c)
    assert_within(found.dots, expected.dots, bounds.dots, "dots")
    assert_within(found.lse, expected.lse, bounds.lse(expected.lse), "lse")


@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slots_of_8_bits(form: str, dtype: torch.dtype) -> None:
    c = case(3, 37, 48, 32, dtype, form, logits=True, row="mean", softcap=3.0)
    check(replace(c, options={**c.options, "probe": probe(c), "virtual": virtual(c, [[2, 0], [5, 1]])}))


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_every_code(form: str) -> None:
    """All 256 patterns but e4m3's two that are no number, as keys one by one, read back by unit queries."""
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F] if form == "fp8" else codes[codes != 128]
    codes = torch.cat((codes, codes.new_zeros(256 - len(codes)))).view(1, 1, 16, 16)
    scale = torch.full((1, 1, 16, 1), 0.5, dtype=torch.bfloat16).view(torch.uint8)
    keys = torch.cat((codes, scale), -1)
    query = torch.eye(16, dtype=torch.bfloat16).view(1, 1, 16, 16)
    kind = torch.int8 if form == "int8" else torch.float8_e4m3fn
    expected = codes.view(kind).float().mT * 0.5
    found = kernel.decode(
        query.to(DEVICE), keys.to(DEVICE), keys.to(DEVICE), None, 1.0, form=form, logits=True
    )
    assert torch.equal(found.logits[0, 0].cpu(), expected[0, 0])
    c = Case(query, keys, keys, None, 1.0, form)
    assert_within(found.out, wanted(c).out, Bounds.of(c).out, "out")


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_values_of_very_unequal_scale(form: str) -> None:
    """Small values first, then large, then zeros: what was summed before is scaled anew each time."""
    c = case(2, 48, 16, 16, torch.float16, form, ragged=False)
    size = torch.tensor([1e-4] * 20 + [0.0] * 4 + [50.0] * 16 + [1e-4] * 8)[:, None]
    c.values = Codec(form).encode(torch.randn(2, 2, 48, 16) * size)
    check(c, replace(SMALL, splits=1))
    # All of them too small for fp16 to hold their weighted scales as they are.
    c = replace(c, query=c.query.bfloat16(), values=Codec(form).encode(torch.randn(2, 2, 48, 16) * 1e-5))
    inputs = [moved(x) for x in (c.query, c.keys, c.values)]
    found = kernel.decode(*inputs, None, c.scaling, form=form, config=SMALL)
    assert_within(found.out, wanted(c).out, Bounds.of(c).out, "out")


@pytest.mark.parametrize("form", ["model", "int8"])
@pytest.mark.parametrize("counted", [False, True])
def test_banks_of_several_sizes(form: str, counted: bool) -> None:
    b, h, codec = 2, 3, Codec(form)
    one, two = slice(0, 1), slice(1, 2)
    sizes = [(slice(0, 2), one, 40), (one, slice(1, 3), 9), (two, two, 21), (two, slice(2, 3), 1)]
    whole = case(2, 40, 48, 32, torch.float32, form, ragged=False, b=b, h=h)
    held, banks = torch.zeros(b, h, dtype=torch.int32), []
    for rows, heads, size in sizes:
        held[rows, heads] = size
        part = [x[rows, heads, :size] for x in (whole.keys, whole.values)]
        # In storages of their own, one of which has a slot more than it uses.
        own = [torch.cat((x, torch.zeros_like(x[:, :, :1])), 2).to(DEVICE)[:, :, :size] for x in part]
        banks.append((rows, heads, *own))
    table = twin.Table.of(banks)
    assert table.slots == 40
    count = torch.minimum(held, torch.randint(0, 40, (b, h), dtype=torch.int32)) if counted else None
    options = {"probe": probe(whole), "logits": True, "row": "mean", "softcap": 4.0}
    options["virtual"] = virtual(whole, [[0.0, 2.0, 3.0], [1.0, 0.0, 9.0]])
    c = replace(whole, count=count if counted else held, options=options)
    expected = wanted(c)
    given = moved_all(options)
    inputs = (c.query.to(DEVICE), *banks[0][2:], moved(count), c.scaling)
    assert codec.columns(48) == banks[0][2].shape[-1]
    compare(twin.decode(*inputs, form=form, table=table, **given), c, expected, "twin")
    for aligned in (table.aligned, False):
        at = replace(table, aligned=aligned)
        found = kernel.decode(*inputs, form=form, table=at, config=SMALL, **given)
        compare(found, c, expected, f"kernel, aligned {aligned}")


def test_a_table_that_does_not_fit() -> None:
    keys = torch.zeros(2, 2, 3, 16)
    whole = (slice(0, 2), slice(0, 2), keys, keys)
    with pytest.raises(ValueError, match="same row and head"):
        twin.Table.of([whole, whole])
    with pytest.raises(ValueError, match="do not cover"):
        twin.Table.of([(slice(1, 3), slice(0, 2), keys, keys)])
    with pytest.raises(ValueError, match="one dtype"):
        twin.Table.of([whole, (slice(2, 4), slice(0, 2), keys.half(), keys)])
    with pytest.raises(ValueError, match="does not name"):
        twin.Table.of([(slice(0, 3), slice(0, 2), keys, keys)])


def test_twin_in_float64() -> None:
    c = case(3, 33, 48, 32, torch.float64, logits=True, row="mean", softcap=2.0)
    c.options |= {"probe": probe(c), "virtual": virtual(c, [[2.0, 0.0], [5.0, 1.0]])}
    options = moved_all(c.options)
    inputs = [moved(x) for x in (c.query, c.keys, c.values, c.count)]
    compare(twin.decode(*inputs, c.scaling, **options), c, wanted(c), "twin")


def test_extreme_logits() -> None:
    """Logits in the hundreds: neither the splits nor their join leaves the range of exp."""
    c = case(2, 70, 16, 16, ragged=False)
    c.query *= 100
    expected = wanted(replace(c, query=c.query / 100, scaling=c.scaling * 100))
    assert float(expected.lse.max()) > 100
    check(c)


def test_what_is_not_served() -> None:
    assert kernel.serves(128, 64, 4, torch.bfloat16, "int8") is None
    for arguments, phrase in [
        ((40, 64, 4, torch.float32, "model"), "40"),
        ((64, 512, 4, torch.float32, "model"), "512"),
        ((64, 64, 100, torch.float32, "model"), "100 query heads"),
        ((64, 64, 4, torch.float64, "model"), "float64"),
        ((64, 64, 4, torch.float32, "int3"), "int3"),
    ]:
        assert phrase in (kernel.serves(*arguments) or "")
    c = case(dk=24)
    with pytest.raises(InputError, match="24"):
        kernel.decode(c.query, c.keys, c.values, None, 1.0)
    c = case()
    with pytest.raises(InputError, match="float16"):
        kernel.decode(c.query, c.keys.half(), c.values.half(), None, 1.0)


def test_only_the_kernel_needs_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import modicum.kernels.decode_twin
try:
    import modicum.kernels.decode
except ImportError:
    sys.exit(7)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 7
