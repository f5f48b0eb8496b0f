"""Sequences of token ids, and what they have in common."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import takewhile

TokenIds = tuple[int, ...]


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """How many token ids all rows begin with."""
    own = [list(row) for row in rows]
    # In the order of dictionaries the first and the last have least in common.
    pairs = zip(min(own), max(own), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def longest(rows: Collection[TokenIds]) -> list[TokenIds]:
    """Those that no other one begins with: to read these is to read all."""
    return [row for row in rows if not any(o != row and o[: len(row)] == row for o in rows)]
