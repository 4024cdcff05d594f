"""How states are cut into tiles: everything covered, nothing past the limits, and by the shape of one row alone."""

from __future__ import annotations

import pytest
import torch
from sdesolve_kernels._triton import arguments, launch
from sdesolve_kernels._triton.geometry import geometry, grid, splits_of

SIZES = [1, 2, 3, 4, 5, 7, 8, 12, 20, 31, 33, 64, 80, 100, 784, 1000, 1023, 3072, 4097, 786432, 2**31 + 4, 2**33]


@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("aligned", [True, False])
def test_tiles_cover_a_row(m, itemsize, aligned):
    tile = geometry(m, itemsize, aligned)
    late = 0 if tile.aligned or tile.vec == 1 else 3  # a row may start that far into its first Philox block
    width = tile.lanes * tile.vec
    assert (tile.chunks - 1) * width < m + late <= tile.chunks * width
    assert tile.lanes & (tile.lanes - 1) == 0
    assert tile.block % tile.lanes == 0
    assert not tile.aligned or m % tile.vec == 0
    assert tile.rows == 1 or tile.rows * m < 2**31, "offsets within a tile are 32-bit"
    per_split, splits = splits_of(tile)
    assert (splits - 1) * per_split < tile.chunks <= splits * per_split


@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("batch", [1, 2, 1000, 2**20, 2**33])
def test_grid_is_within_the_limits(batch, m):
    tile = geometry(m, 4, True)
    x, y, z = grid(batch, tile)
    assert 1 <= x < 2**31
    assert 1 <= y < 2**16
    assert 1 <= z < 2**16
    assert y * z >= tile.chunks
    assert x <= -(-batch // tile.rows)


def test_huge_states_are_launched_with_64_bit_sizes():
    """Element and row counts past 2^31, on tensors without storage."""
    for shape in ((2**33, 1), (2**20, 2**13), (1, 2**35)):
        x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        with arguments.recording() as launches:
            launch.perturb(x, 1.0, 1.0, seed=0, stream=0, first_path=2**40, step=2**30)
        (item,) = launches
        assert (item.arguments["batch"], item.arguments["m"]) == shape
        assert all(size < 2**31 for size in item.grid)
