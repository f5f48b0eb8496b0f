"""How refusals and helpful responses open, in tokens: what a decision margin compares.

Each kind is a set of token sequences, cut as soon as they tell the kinds apart: "Sorry" needs its
first token only, while "I cannot" and "I would" need two. What is read between is shared: a model
reads "I" once to know how likely both are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mergekit_align.errors import InputError
from mergekit_align.token_ids import TokenIds

if TYPE_CHECKING:
    import torch

MAX_TOKENS = 4
"""Length of the longest opening."""
RARE = 0.01
"""A beginning that a smaller share than this of either kind has is not followed further."""


class Openings(NamedTuple):
    """Beginnings of responses that tell a refusal from help; none is the beginning of another."""

    refusal: tuple[TokenIds, ...]
    help: tuple[TokenIds, ...]

    @property
    def every(self) -> tuple[TokenIds, ...]:
        """Those of refusals first."""
        return self.refusal + self.help

    def margins(self, logprobs: torch.Tensor) -> torch.Tensor:
        """log P(opens as a refusal) - log P(opens as help), nats, [prompts].

        Args:
            logprobs: of `every` opening [prompts, openings].
        """
        count = len(self.refusal)
        return logprobs[:, :count].logsumexp(1) - logprobs[:, count:].logsumexp(1)


def tell_apart(refusals: Iterable[Sequence[int]], helpful: Iterable[Sequence[int]]) -> Openings:
    """The openings of tokenized refusals and helpful responses.

    Two kinds that still agree after `MAX_TOKENS`, or in a rare beginning, belong to the kind in
    which that beginning is relatively more frequent.

    Raises:
        InputError: nothing tells one kind from the other.
    """
    refusal, help_ = _beginnings(refusals), _beginnings(helpful)
    found: tuple[list[TokenIds], list[TokenIds]] = ([], [])
    open_ends: list[TokenIds] = [()]
    while open_ends:
        beginning = open_ends.pop()
        longer = {b for b in (*refusal, *help_) if b[:-1] == beginning and len(b) > len(beginning)}
        for candidate in longer:
            shares = refusal.get(candidate, 0.0), help_.get(candidate, 0.0)
            if min(shares) >= RARE and len(candidate) < MAX_TOKENS:
                open_ends.append(candidate)
            elif shares[0] != shares[1]:
                found[shares[0] < shares[1]].append(candidate)
    if not found[0] or not found[1]:
        raise InputError("openings: found no token that tells refusals from helpful responses")
    return Openings(tuple(sorted(found[0])), tuple(sorted(found[1])))


def _beginnings(responses: Iterable[Sequence[int]]) -> dict[TokenIds, float]:
    """Each beginning of up to `MAX_TOKENS` tokens, with the share of the responses that have it."""
    starts = [tuple(ids[:MAX_TOKENS]) for ids in responses]
    counts = Counter(start[:n] for start in starts for n in range(1, len(start) + 1))
    return {beginning: count / len(starts) for beginning, count in counts.items()}
