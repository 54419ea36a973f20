"""All compiled kernels. Importing this needs numba."""

from modicum.stereo.cost_kernels import difference_row, hamming_rows, sum_rows
from modicum.stereo.path_kernels import path_row, penalty_row, sweep
from modicum.stereo.select_kernels import fill_rows, median_rows, select_row, select_rows
from modicum.stereo.transform import census_rows, rank_rows

__all__ = [
    "census_rows",
    "difference_row",
    "fill_rows",
    "hamming_rows",
    "median_rows",
    "path_row",
    "penalty_row",
    "rank_rows",
    "select_row",
    "select_rows",
    "sum_rows",
    "sweep",
]
