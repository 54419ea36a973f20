"""Semi-global matching in plain loops over Python's integers: the oracle of the kernels and the hardware."""

from __future__ import annotations

from typing import Any

Image = list[list[int]]
Volume = list[list[list[int]]]


def neighbours(image: Image, y: int, x: int, side: int) -> list[tuple[int, int, int]]:
    """(dy, dx, value) of the pixels around one, without it, that are in the image; in reading order."""
    half = side // 2
    found = []
    for dy in range(-half, half + 1):
        for dx in range(-half, half + 1):
            inside = 0 <= y + dy < len(image) and 0 <= x + dx < len(image[0])
            if (dy or dx) and inside:
                found.append((dy, dx, image[y + dy][x + dx]))
    return found


def rank(image: Image, side: int) -> Image:
    return [
        [sum(value < own for _, _, value in neighbours(image, y, x, side)) for x, own in enumerate(row)]
        for y, row in enumerate(image)
    ]


def pattern(image: Image, y: int, x: int, side: int, is_above: bool) -> dict[tuple[int, int], int]:
    """Whether each neighbour is above, or below, the pixel; neighbours outside are absent."""
    own = image[y][x]
    return {
        (dy, dx): int(value > own if is_above else value < own)
        for dy, dx, value in neighbours(image, y, x, side)
    }


def cost(left: Image, right: Image, disparities: int, c: Any) -> Volume:
    """C [H][W][D] of CostSettings."""
    height, width = len(left), len(left[0])
    if c.kind in ("census", "rank-structure"):
        is_above = c.kind == "rank-structure"
        a, b = (
            [[pattern(image, y, x, c.rank_window, is_above) for x in range(width)] for y in range(height)]
            for image in (left, right)
        )

        def unlike(y: int, x: int, d: int) -> int:
            one, two = a[y][x], b[y][max(0, x - d)]
            return sum(one.get(key, 0) != two.get(key, 0) for key in {*one, *two})

        found = [[[unlike(y, x, d) for d in range(disparities)] for x in range(width)] for y in range(height)]
    else:
        ranked = c.kind in ("rank-ad", "rank-sad", "unified")
        one, two = (rank(i, c.rank_window) if ranked else i for i in (left, right))

        def difference(y: int, x: int, d: int) -> int:
            return abs(one[y][x] - two[y][max(0, x - d)])

        def summed(y: int, x: int, d: int) -> int:
            half = c.window // 2 if c.kind in ("sad", "rank-sad", "unified") else 0
            return sum(
                difference(yy, xx, d)
                for yy in range(max(0, y - half), min(height, y + half + 1))
                for xx in range(max(0, x - half), min(width, x + half + 1))
            )

        alpha, beta = (c.alpha, c.beta) if c.kind == "unified" else (0, 1)
        found = [
            [
                [alpha * difference(y, x, d) + beta * summed(y, x, d) for d in range(disparities)]
                for x in range(width)
            ]
            for y in range(height)
        ]
    if c.limit is None:
        return found
    return [[[min(value, c.limit) for value in pixel] for pixel in row] for row in found]


DOWN = [(0, -1), (-1, -1), (-1, 0), (-1, 1)]
"""Where the four causal paths come from, (dy, dx)."""
UP = [(-dy, -dx) for dy, dx in DOWN]


def path(costs: Volume, source: tuple[int, int], p1: int, p2: Any) -> Volume:
    """L [H][W][D] of one direction. p2: a number, or a function of (y, x) and where the path comes from."""
    height, width, disparities = len(costs), len(costs[0]), len(costs[0][0])
    dy, dx = source
    found: Volume = [[[] for _ in range(width)] for _ in range(height)]
    for y in range(height) if (dy, dx) < (0, 0) else range(height - 1, -1, -1):
        for x in range(width) if (dy, dx) < (0, 0) and (dy, dx) != (0, 1) else range(width - 1, -1, -1):
            yy, xx = y + dy, x + dx
            inside = 0 <= yy < height and 0 <= xx < width
            before = found[yy][xx] if inside else [0] * disparities
            large = p2(y, x, yy, xx) if callable(p2) and inside else (0 if callable(p2) else p2)
            least = min(before)
            for d in range(disparities):
                terms = [before[d], least + large]
                terms += [before[k] + p1 for k in (d - 1, d + 1) if 0 <= k < disparities]
                found[y][x].append(costs[y][x][d] + min(terms) - least)
    return found


def sums(costs: Volume, paths: int, p1: int, p2: Any) -> Volume:
    """S [H][W][D]."""
    each = [path(costs, source, p1, p2) for source in (DOWN if paths == 4 else DOWN + UP)]
    return [
        [[sum(values) for values in zip(*pixels, strict=True)] for pixels in zip(*rows, strict=True)]
        for rows in zip(*each, strict=True)
    ]


def winner(values: list[int]) -> int:
    """The smallest of equal ones."""
    return values.index(min(values))


def select(
    total: Volume, subpixel: bool, left_right: int | None, uniqueness: int, keeps_outside: bool = False
) -> Image:
    """Disparities [H][W] in 1/16 pixel; -1 for none."""
    found = []
    for row in total:
        width, disparities = len(row), len(row[0])
        right = []
        for x in range(width):
            seen = [row[x + d][d] for d in range(disparities) if x + d < width]
            right.append(winner(seen))
        line = []
        for x, values in enumerate(row):
            d = winner(values)
            if left_right is not None:
                is_good = keeps_outside if x < d else abs(right[x - d] - d) <= left_right
                if not is_good:
                    line.append(-1)
                    continue
            others = [v for k, v in enumerate(values) if abs(k - d) > 1]
            if uniqueness and others and min(others) * (100 - uniqueness) < values[d] * 100:
                line.append(-1)
                continue
            shift = 0
            if subpixel and 0 < d < disparities - 1:
                lower, upper = values[d - 1], values[d + 1]
                bend = lower + upper - 2 * values[d]
                # The parabola's lowest point is (lower - upper) / (2 bend) beside d; halves go up.
                shift = ((lower - upper) * 16 + bend) // (2 * bend) if bend else 0
            line.append(16 * d + shift)
        found.append(line)
    return found


def median(image: Image) -> Image:
    found = []
    for y, row in enumerate(image):
        line = []
        for x, own in enumerate(row):
            near = {(dy, dx): v for dy, dx, v in neighbours(image, y, x, 3)}
            values = [near.get((dy, dx), own) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            values = sorted(own if v < 0 else v for v in values)
            line.append(values[4] if own >= 0 else -1)
        found.append(line)
    return found


def fill(image: Image) -> Image:
    found = []
    for row in image:
        line = []
        for x, own in enumerate(row):
            before = next((v for v in reversed(row[:x]) if v >= 0), None)
            after = next((v for v in row[x:] if v >= 0), None)
            known = [v for v in (before, after) if v is not None]
            line.append(own if own >= 0 else min(known, default=-1))
        found.append(line)
    return found
