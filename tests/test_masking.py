"""Block masks: the recorded draws, and what holds for every grid."""

import hashlib
import random

import numpy as np
import pytest
from goldens_io import golden
from hypothesis import given, settings
from hypothesis import strategies as st

from simla.dataset.masking import BlockMask
from simla.utils import UserError

every_grid = st.tuples(st.integers(1, 24), st.integers(1, 24))


def test_recorded_masks_are_reproduced():
    recorded = golden("masking")
    mask = BlockMask(tuple(recorded["window"]), recorded["num_masking_patches"], recorded["min_num_patches"])
    rng = random.Random(recorded["python_random_seed"])
    masks = np.stack([mask(rng) for _ in range(recorded["draws"])]).astype(np.uint8)
    assert hashlib.sha256(masks.tobytes()).hexdigest() == recorded["sha256_of_all_masks_uint8"]
    assert masks.sum((1, 2)).mean() == recorded["count_mean"]


@given(every_grid, st.data())
@settings(max_examples=200)
def test_any_grid_masks_at_least_one_patch_and_at_most_the_number_asked(grid, data):
    num_masked = data.draw(st.integers(0, grid[0] * grid[1]))
    mask = BlockMask(grid, num_masked)(random.Random(data.draw(st.integers(0, 99))))
    assert mask.shape == grid
    assert mask.dtype == bool
    assert min(num_masked, 1) <= mask.sum() <= num_masked


def test_a_grid_without_room_for_blocks_gets_single_patches():
    assert BlockMask((1, 6), 4)(random.Random(0)).sum() == 4
    assert BlockMask(1, 1)(random.Random(0)).sum() == 1


@given(st.integers(8, 24), st.integers(0, 99))
@settings(max_examples=50)
def test_the_usual_share_is_nearly_met(side, seed):
    num_masked = side * side * 75 // 256
    assert BlockMask(side, num_masked)(random.Random(seed)).sum() > 0.7 * num_masked


def test_the_mask_depends_on_its_generator_alone():
    mask = BlockMask(16, 75)
    state = random.getstate()
    assert np.array_equal(mask(random.Random(3)), mask(random.Random(3)))
    assert not np.array_equal(mask(random.Random(3)), mask(random.Random(4)))
    assert random.getstate() == state


@pytest.mark.parametrize("num_masked", [-1, 17])
def test_more_patches_than_the_grid_has_are_refused(num_masked):
    with pytest.raises(UserError, match="4 x 4"):
        BlockMask(4, num_masked)
