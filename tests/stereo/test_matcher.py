"""The kernels beside plain loops, bit for bit; and what holds of any match."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from numpy.typing import NDArray

from modicum.errors import InputError
from tests.stereo import reference

pytest.importorskip("numba", reason="numba is not installed")

from modicum.stereo import (
    COSTS,
    CostSettings,
    PathSettings,
    RefineSettings,
    StereoMatcher,
    StereoSettings,
    WordLengths,
    match,
)
from modicum.stereo.settings import penalty_table

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def random_pair(seed: int, height: int, width: int, levels: int = 256, dtype: type = np.uint8) -> Pair:
    draw = np.random.default_rng(seed)
    left, right = draw.integers(0, levels, (2, height, width)).astype(dtype)
    return left, right


COST = st.builds(
    CostSettings,
    kind=st.sampled_from(COSTS),
    rank_window=st.sampled_from([3, 5, 7]),
    window=st.sampled_from([1, 3, 5]),
    alpha=st.sampled_from([0, 1, 4]),
    beta=st.sampled_from([1, 2]),
    limit=st.sampled_from([None, 7, 100]),
)
SIZE = {"height": st.integers(1, 9), "width": st.integers(3, 14)}


@examples(max_examples=60)
@given(seed=st.integers(0, 9999), cost=COST, levels=st.sampled_from([3, 256]), share=st.floats(0, 1), **SIZE)
def test_costs_are_those_of_the_loops(
    seed: int, cost: CostSettings, levels: int, share: float, height: int, width: int
) -> None:
    left, right = random_pair(seed, height, width, levels)
    disparities = 2 + int(share * (width - 2))
    found = StereoMatcher(StereoSettings(disparities, cost)).costs(left, right)
    expected = reference.cost(left.tolist(), right.tolist(), disparities, cost)
    assert found.tolist() == expected
    assert found.max() <= cost.max_cost(8)


@examples(max_examples=40)
@given(
    seed=st.integers(0, 9999),
    paths=st.sampled_from([4, 8]),
    p1=st.integers(0, 20),
    more=st.sampled_from([0, 1, 60, 150, 151, 190, 191, 192, 500]),  # path values of 8 bits, and of 16
    contrast=st.sampled_from([0, 1, 16]),
    **SIZE,
)
def test_sums_are_those_of_the_loops(
    seed: int, paths: int, p1: int, more: int, contrast: int, height: int, width: int
) -> None:
    left, right = random_pair(seed, height, width)
    cost = CostSettings(window=1)
    settings = StereoSettings(3, cost, PathSettings(paths, p1, p1 + more, contrast))
    matcher = StereoMatcher(settings)
    costs = matcher.costs(left, right).tolist()

    def large(y: int, x: int, yy: int, xx: int) -> int:
        if contrast == 0:
            return p1 + more
        change = abs(int(left[y, x]) - int(left[yy, xx]))
        return min(p1 + more, max(p1 + 1, (p1 + more) // max(1, change // contrast)))

    found = matcher.sums(left, right)
    assert found.tolist() == reference.sums(costs, paths, p1, large)
    assert found.max() <= settings.word_lengths().max_sum


@pytest.mark.parametrize(("disparities", "p2"), [(32, 40), (39, 40), (39, 400), (70, 40)])
def test_sums_of_many_disparities_are_those_of_the_loops(disparities: int, p2: int) -> None:
    left, right = random_pair(3, 3, disparities)
    settings = StereoSettings(disparities, CostSettings(), PathSettings(8, 10, p2, 0))
    matcher = StereoMatcher(settings)
    costs = matcher.costs(left, right).tolist()
    assert matcher.sums(left, right).tolist() == reference.sums(costs, 8, 10, p2)


@examples(max_examples=40)
@given(
    seed=st.integers(0, 9999),
    subpixel=st.booleans(),
    left_right=st.sampled_from([None, 0, 1]),
    uniqueness=st.sampled_from([0, 10]),
    **SIZE,
)
def test_the_selection_is_that_of_the_loops(
    seed: int, subpixel: bool, left_right: int | None, uniqueness: int, height: int, width: int
) -> None:
    left, right = random_pair(seed, height, width)
    for median, fill in ((False, False), (True, False), (True, True)):
        refine = RefineSettings(subpixel, left_right, uniqueness, median, fill)
        matcher = StereoMatcher(StereoSettings(3, path=PathSettings(4), refine=refine))
        expected = reference.select(
            matcher.sums(left, right).tolist(), subpixel, left_right, uniqueness, fill
        )
        if median:
            expected = reference.median(expected)
        if fill:
            expected = reference.fill(expected)
        assert matcher.match(left, right).fixed.tolist() == expected


@examples(max_examples=10)
@given(seed=st.integers(0, 9999), kind=st.sampled_from(COSTS), paths=st.sampled_from([4, 8]))
def test_threads_change_nothing(seed: int, kind: str, paths: int) -> None:
    left, right = random_pair(seed, 13, 17)
    settings = StereoSettings(9, CostSettings(kind), PathSettings(paths))  # type: ignore[arg-type]
    expected = match(left, right, settings).fixed
    for threads in (2, 3, 8):
        assert (match(left, right, settings, threads).fixed == expected).all()


@pytest.mark.parametrize("kind", [kind for kind in COSTS if kind not in ("ad", "sad")])
def test_ranks_do_not_see_a_rising_change_of_the_intensities(kind: str) -> None:
    left, right = random_pair(5, 12, 20, 200)
    changed = np.sort(np.random.default_rng(6).permutation(256)[:200]).astype(np.uint8)[right]
    settings = StereoSettings(6, CostSettings(kind))  # type: ignore[arg-type]
    assert (match(left, right, settings).fixed == match(left, changed, settings).fixed).all()


@pytest.mark.parametrize("paths", [4, 8])
@pytest.mark.parametrize("kind", COSTS)
def test_a_shifted_random_image_is_matched(kind: str, paths: int) -> None:
    scene = np.random.default_rng(1).integers(0, 256, (24, 60)).astype(np.uint8)
    left, right = scene[:, :48], scene[:, 5:53]  # the pixel x of the left image is x - 5 of the right one
    found = match(left, right, StereoSettings(12, CostSettings(kind), PathSettings(paths)))  # type: ignore[arg-type]
    inner = found.pixels[4:-4, 12:-4]
    assert np.isfinite(inner).all()
    assert np.abs(inner - 5).max() < 0.5


def test_sixteen_bits_and_the_upper_byte_give_the_same_ranks() -> None:
    left, right = random_pair(2, 10, 20)
    wide = [image.astype(np.uint16) * 256 for image in (left, right)]
    assert (match(*wide, StereoSettings(6)).fixed == match(left, right, StereoSettings(6)).fixed).all()


def test_a_constant_image_gives_disparity_zero() -> None:
    flat = np.full((10, 20), 77, np.uint8)
    found = match(flat, flat, StereoSettings(6))
    assert (found.fixed == 0).all()


# -- word lengths --------------------------------------------------------------------------------------------


@examples(max_examples=60)
@given(seed=st.integers(0, 9999), most=st.integers(1, 40), p1=st.integers(0, 20), more=st.integers(0, 40))
def test_no_path_value_is_above_its_bound(seed: int, most: int, p1: int, more: int) -> None:
    costs = np.random.default_rng(seed).choice([0, most], (5, 6, 4)).tolist()
    lengths = WordLengths(most, p1, p1 + more, 4)
    for source in reference.DOWN:
        values = np.array(reference.path(costs, source, p1, p1 + more))
        assert values.min() >= 0
        assert values.max() <= lengths.max_path
        assert values.min(2).max() <= most


def test_the_bound_of_path_values_is_reached() -> None:
    """Where one disparity is free at a pixel, and all cost C_max at the next."""
    most, p1, p2 = 17, 4, 32
    values = reference.path([[[0] + [most] * 3, [most] * 4]], (0, -1), p1, p2)
    lengths = WordLengths(most, p1, p2, 4)
    assert values[0][1] == [most, most + p1, most + 17, most + 17]
    values = reference.path(
        [[[0] + [most] * 3, [0] + [most] * 3, [0] + [most] * 3, [most] * 4]], (0, -1), p1, p2
    )
    assert max(values[0][3]) == lengths.max_path == 49
    assert lengths.path_bits == 6


def test_what_may_overflow_is_refused_with_the_numbers() -> None:
    wide = random_pair(0, 8, 16, 2**16, np.uint16)
    with pytest.raises(InputError, match=r"16 bits hold 65,535"):
        match(*wide, StereoSettings(4, CostSettings("ad")))
    with pytest.raises(InputError, match=r"16 bits hold 65,535"):
        match(*wide, StereoSettings(4, CostSettings("sad", limit=100)))
    with pytest.raises(InputError, match="reach"):
        match(*random_pair(0, 8, 16), StereoSettings(4, path=PathSettings(8, 10, 9000)))
    # Just below the limit nothing wraps.
    p2 = 65_535 // 8 - CostSettings().max_cost(8)
    settings = StereoSettings(4, path=PathSettings(8, p2, p2))
    left, right = random_pair(0, 8, 16)
    matcher = StereoMatcher(settings)
    costs = matcher.costs(left, right).tolist()
    assert matcher.sums(left, right).tolist() == reference.sums(costs, 8, p2, p2)


@given(p1=st.integers(0, 30), more=st.integers(0, 200), contrast=st.integers(1, 255))
def test_an_adaptive_p2_is_between_p1_and_p2(p1: int, more: int, contrast: int) -> None:
    table = penalty_table(WordLengths(10, p1, p1 + more, 4), contrast).tolist()
    assert table[0] == p1 + more
    assert all(min(p1 + 1, p1 + more) <= value <= p1 + more for value in table)
    assert table == sorted(table, reverse=True)


# -- bad input -----------------------------------------------------------------------------------------------


def test_images_that_do_not_fit_are_refused() -> None:
    image = np.zeros((8, 16), np.uint8)
    settings = StereoSettings(4)
    for left, right, told in (
        (image, image[:, 1:], "16 x 8 and 15 x 8"),
        (image, image.astype(np.uint16), "8 and 16 bits"),
        (image, image.astype(np.float32), "the right image is float32"),
        (np.zeros((8, 16, 3), np.uint8), image, r"\[8, 16, 3\]"),
        (image[:, :3], image[:, :3], "4 disparities and 3 columns"),
        (image[:0], image[:0], "no pixels"),
    ):
        with pytest.raises(InputError, match=told):
            match(left, right, settings)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: CostSettings("mutual"), "give one of ad, sad"),  # type: ignore[arg-type]
        (lambda: CostSettings(window=4), "window is 4: give an odd number"),
        (lambda: CostSettings(rank_window=2), "rank_window is 2"),
        (lambda: CostSettings("census", rank_window=9), "at most 7"),
        (lambda: CostSettings(alpha=3), "power of two"),
        (lambda: CostSettings("unified", alpha=0, beta=0), "alpha and beta are 0"),
        (lambda: CostSettings(limit=0), "limit is 0"),
        (lambda: PathSettings(5), "4 or 8"),
        (lambda: PathSettings(8, 10, 9), "P2 is 9, below P1, which is 10"),
        (lambda: StereoSettings(path=PathSettings(8, p2=0)).word_lengths(), "P2 is 0, below P1"),
        (lambda: PathSettings(8, -1), "p1 is -1"),
        (lambda: PathSettings(contrast=256), "0 to 255"),
        (lambda: StereoSettings(1), "disparities is 1"),
        (lambda: RefineSettings(left_right=-1), "left_right is -1"),
        (lambda: RefineSettings(uniqueness=100), "uniqueness is 100"),
        (lambda: StereoMatcher(threads=0), "threads is 0"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        make()


def test_p2_is_at_least_a_given_p1() -> None:
    assert StereoSettings(path=PathSettings(8, p1=5000)).word_lengths().p2 == 5000
