"""Block-wise masking of image patches, as in BEiT: rectangles until about `num_masked` patches are hidden."""

import math
import random

import numpy as np

from simla.utils import UserError


class BlockMask:
    """Draws which patches of an image are hidden."""

    def __init__(
        self, grid_size: int | tuple[int, int], num_masked: int, min_block: int = 16, min_aspect: float = 0.3
    ) -> None:
        """`num_masked`: patches in all; `min_block`: in one block, of aspect min_aspect to 1 / min_aspect."""
        self.height, self.width = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
        if not 0 <= num_masked <= self.height * self.width:
            raise UserError(
                f"num_masking_patches {num_masked} exceeds the {self.height} x {self.width} patches; "
                "lower it or raise image_res"
            )
        self.num_masked = num_masked
        self.min_block = min(min_block, num_masked)
        self.log_aspect = abs(math.log(min_aspect))

    def __call__(self, rng: random.Random) -> np.ndarray:
        """Return a boolean (height, width) mask: at most `num_masked` patches, often a few less, not 0."""
        mask = np.zeros((self.height, self.width), dtype=bool)
        missing = self.num_masked
        while missing > 0 and (added := self._add_block(mask, missing, rng)):
            missing -= added
        if missing == self.num_masked > 0:  # the grid is too small for any block: single patches instead
            mask.ravel()[rng.sample(range(mask.size), missing)] = True
        return mask

    def _add_block(self, mask: np.ndarray, missing: int, rng: random.Random) -> int:
        """Mask one more rectangle in place; return the number of patches added, 0 after ten tries in vain."""
        for _ in range(10):
            # With few missing the bounds swap: the block is then too large, unless it overlaps with others.
            area = rng.uniform(self.min_block, missing)
            aspect = math.exp(rng.uniform(-self.log_aspect, self.log_aspect))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height < self.height and width < self.width:
                top, left = rng.randint(0, self.height - height), rng.randint(0, self.width - width)
                block = mask[top : top + height, left : left + width]
                added = block.size - int(block.sum())
                if 0 < added <= missing:
                    block[:] = True
                    return added
        return 0
