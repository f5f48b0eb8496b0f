"""Arithmetic entry by entry, a stretch of the tensors at a time, so that what is made on the way to the
result stays in the processor's caches. On one core a merge of three 59M-entry tensors took 0.35 s of
its time so, and 1.3 s at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

ENTRIES = 2**16
"""Of a stretch, for each of the processor's threads."""


def stretches(tensor: torch.Tensor) -> Iterator[slice]:
    """Where a tensor's entries are read in turn; all at once where it is on a GPU."""
    size = tensor.numel()
    length = ENTRIES * torch.get_num_threads() if tensor.device.type == "cpu" else max(1, size)
    for start in range(0, size, length):
        yield slice(start, min(start + length, size))


def in_stretches(
    function: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """`function` of tensors of one shape, where each entry of the result follows from theirs alone.

    Args:
        function: takes as many tensors as there are, in `dtype` unless they are truth values.
    """
    first = tensors[0]
    merged = torch.empty(first.shape, dtype=dtype, device=first.device)
    result, rows = merged.view(-1), [tensor.reshape(-1) for tensor in tensors]
    for piece in stretches(merged):
        own = [row[piece] if row.dtype == torch.bool else row[piece].to(dtype) for row in rows]
        result[piece] = function(*own)
    return merged
