"""Sequences of token ids, and what they have in common."""

from __future__ import annotations

from collections.abc import Collection, Sequence

TokenIds = tuple[int, ...]


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """How many token ids all rows begin with."""
    if len(rows) > 2:  # in the order of dictionaries the first and the last have least in common
        own = [list(row) for row in rows]
        rows = min(own), max(own)
    first, last = rows[0], rows[-1]
    for n, (one, other) in enumerate(zip(first, last, strict=False)):
        if one != other:
            return n
    return min(len(first), len(last))


def longest(rows: Collection[TokenIds]) -> list[TokenIds]:
    """Those that no other one begins with: to read these is to read all."""
    return [row for row in rows if not any(o != row and o[: len(row)] == row for o in rows)]
