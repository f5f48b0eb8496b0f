"""Arithmetic entry by entry, a stretch of the tensors at a time, so that what is made on the way to the
result stays in the processor's caches. On one core a merge of three 59M-entry tensors took 0.35 s of
its time so, and 1.3 s at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

_ENTRIES = 2**16
"""Of a stretch, for each of the processor's threads."""


def in_stretches(
    function: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """`function` of tensors of one shape, where each entry of the result follows from theirs alone.

    Args:
        function: takes as many tensors as there are; those that are not `dtype` or truth values have
            been converted to it.
    """
    first = tensors[0]
    merged = torch.empty(first.shape, dtype=dtype, device=first.device)
    rows = [tensor.reshape(-1) for tensor in tensors]
    result = merged.view(-1)
    size = first.numel()
    step = size if first.device.type != "cpu" else _ENTRIES * torch.get_num_threads()
    for start in range(0, size, max(1, step)):
        piece = slice(start, start + step)
        own = [row[piece] if row.dtype == torch.bool else row[piece].to(dtype) for row in rows]
        result[piece] = function(*own)
    return merged
