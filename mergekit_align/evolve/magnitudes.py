"""The largest numbers of a task vector, for any density, from one sort.

mergekit keeps the first k of `argsort`, whose order among equal magnitudes is its own affair; in
bfloat16 most numbers have equals. So its very order is made once. A density then needs a threshold,
which all larger numbers pass, and of the order only those equal to it that are kept; zeros are zeros
whether they are kept or not. The orders, four bytes a number other than zero, lie in a file of which
only that part is read.
"""

from __future__ import annotations

import functools
import os
import tempfile
from typing import IO, NamedTuple

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


@functools.cache
def _orders() -> IO[bytes]:
    """Where this process keeps them."""
    return tempfile.TemporaryFile()


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
        self._other_than_zero = self._size - int(counts[0])
        order = torch.argsort(vector.abs().float(), descending=True)[: self._other_than_zero]
        self._place = _orders().seek(0, os.SEEK_END)
        order.int().cpu().numpy().tofile(_orders())

    def largest(self, density: float) -> Selection:
        """As `mergekit.sparsify.magnitude` selects them, for a density below 1."""
        if density <= 0:
            return Selection(MAGNITUDE, torch.empty(0, dtype=torch.int32))
        count = min(max(1, int(density * self._size)), self._other_than_zero)
        level = int(torch.searchsorted(self._larger_or_equal, count))
        larger = int(self._larger_or_equal[level - 1]) if level else 0
        _orders().seek(self._place + 4 * larger)
        equal = torch.from_numpy(np.sort(np.fromfile(_orders(), np.int32, count - larger)))
        return Selection(int(self._levels[level]), equal)
