"""The largest numbers of a task vector, for any density, from one sort.

mergekit keeps the first k of `argsort`, whose order among equal magnitudes is its own affair; in
bfloat16 most numbers have equals. So its very order is made once. A density then needs a threshold,
which all larger numbers pass, and of the order only those equal to it that are kept; zeros are zeros
whether they are kept or not. The orders, four bytes a number other than zero, lie in a file that the
system keeps in memory as it sees fit.
"""

from __future__ import annotations

import tempfile
from typing import NamedTuple

import numpy as np
import torch

MAGNITUDE = 0x7FFF
"""All bits of a bfloat16 but its sign: as an integer the larger, the larger the number."""
_SIGN = -0x8000


def keep(numbers: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Bfloat16 numbers times 1 or 0, zeros keeping their signs as in a product.

    On bits, since to turn truth values into numbers takes longer than all the arithmetic.

    Args:
        mask: int16, -1 (all bits) for what is kept and 0 for what is not; of a shape that broadcasts.
    """
    return (numbers.view(torch.int16) & (mask | _SIGN)).view(torch.bfloat16)


class Selection(NamedTuple):
    """Which numbers of a task vector are kept."""

    threshold: int
    """Bits of the magnitude that everything larger than is kept."""
    equal: torch.Tensor
    """Places of the numbers of that very magnitude that are kept, rising."""

    def mask(self, numbers: torch.Tensor, piece: slice) -> torch.Tensor:
        """Which of `numbers` [size], a `piece` of the vector, are kept, as `keep` takes it."""
        # Both are 15 bits: the difference is negative where the number is larger.
        kept = (self.threshold - (numbers.view(torch.int16) & MAGNITUDE)) >> 15
        if self.equal.numel():
            bounds = torch.tensor([piece.start, piece.stop], dtype=self.equal.dtype)
            start, end = torch.searchsorted(self.equal, bounds).tolist()
            kept[(self.equal[start:end] - piece.start).to(kept.device)] = -1
        return kept


class Magnitudes:
    """The order of a task vector's numbers by magnitude.

    Args:
        vector: [numbers], bfloat16.
    """

    def __init__(self, vector: torch.Tensor) -> None:
        counts = torch.bincount(vector.view(torch.int16) & MAGNITUDE).cpu()
        self._levels = counts.nonzero().flatten().flip(0)
        self._larger_or_equal = counts[self._levels].cumsum(0)
        self._size = vector.numel()
        self._order = np.empty(0, np.int32)
        other_than_zero = self._size - int(counts[0])
        if other_than_zero:
            order = torch.argsort(vector.abs().float(), descending=True)[:other_than_zero]
            with tempfile.TemporaryFile() as file:
                order.int().cpu().numpy().tofile(file)
                file.flush()
                self._order = np.memmap(file, dtype=np.int32, mode="r", shape=order.shape)

    def largest(self, density: float) -> Selection:
        """As `mergekit.sparsify.magnitude` selects them, for a density below 1."""
        if density <= 0:
            return Selection(MAGNITUDE, torch.empty(0, dtype=torch.int32))
        count = max(1, int(density * self._size))
        level = int(torch.searchsorted(self._larger_or_equal, count))
        larger = int(self._larger_or_equal[level - 1]) if level else 0
        # Of zeros, which come last, the order ends before the first.
        equal = torch.from_numpy(np.sort(self._order[larger:count]))
        return Selection(int(self._levels[level]), equal)
