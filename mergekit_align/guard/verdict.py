"""Verdicts of a guard model, read from next-token probabilities.

The texts that a guard may answer with form a tree of tokens. Where only one token can follow, it is
taken as given (teacher-forced); where several can, the model's probabilities of those decide. For
most guards there is one such place, the first token in which "safe" and "unsafe" differ, so one
forward pass gives P(unsafe): the softmax over those tokens. The probability that went to any other
token is what the guard did not use to answer; with more than half of it lost, nothing was read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from mergekit_align.errors import InputError
from mergekit_align.token_ids import TokenIds

Meaning = Literal["safe", "unsafe", "controversial"]
Logprobs = Mapping[TokenIds, Mapping[int, float]]
"""For each place in a tree (the tokens read since the prompt), the log-probability of each branch."""

MIN_READABLE = 0.5
"""Share of the probability that must fall on known verdicts."""


class Verdict(NamedTuple):
    """What a guard makes of one conversation."""

    label: Literal["safe", "unsafe", "unreadable"]
    p_unsafe: float | None
    """P(unsafe); `None` where unreadable."""
    p_controversial: float
    """Probability of a guard's third verdict; part of `p_unsafe` unless the user counts it as safe."""
    readable: float
    """Probability that fell on known verdicts; `nan` where the model gave none."""
    categories: tuple[str, ...] = ()
    """Codes of what was violated, of an unsafe one."""
    cut: bool = False
    """Whether the conversation was cut to fit into the guard's context window."""
    evidence: str | None = None
    """Of an unreadable one, what was found instead of a verdict."""


class VerdictTree:
    """A guard's possible answers as token ids, each with its meaning."""

    def __init__(self, answers: Mapping[TokenIds, Meaning]) -> None:
        children: dict[TokenIds, set[int]] = {}
        for ids in answers:
            for length, token in enumerate(ids):
                children.setdefault(ids[:length], set()).add(token)
        if any(ids in children for ids in answers):
            raise InputError("verdicts: found one that is the beginning of another")
        self.answers: dict[TokenIds, Meaning] = dict(answers)
        self.branches: dict[TokenIds, tuple[int, ...]] = {
            place: tuple(sorted(tokens)) for place, tokens in children.items() if len(tokens) > 1
        }
        """The places at which more than one token can follow, and those tokens."""

    def probabilities(self, logprobs: Logprobs) -> tuple[dict[Meaning, float], float]:
        """Probability of each meaning, and the probability that fell on known verdicts.

        `nan` where a branch has no log-probability.
        """
        found: dict[Meaning, float] = {"safe": 0.0, "unsafe": 0.0, "controversial": 0.0}
        readable = 0.0
        share: dict[tuple[TokenIds, int], float] = {}
        for place, branch in logprobs.items():
            total = sum(math.exp(value) for value in branch.values())
            for token, value in branch.items():
                share[place, token] = math.exp(value) / total if total else math.nan
        for ids, meaning in self.answers.items():
            places = [(ids[:n], ids[n]) for n in range(len(ids)) if ids[:n] in self.branches]
            found[meaning] += math.prod(share.get(place, math.nan) for place in places)
            known = [logprobs.get(place, {}).get(token, math.nan) for place, token in places]
            readable += math.exp(sum(known))
        return found, readable


def verdict(
    tree: VerdictTree,
    logprobs: Logprobs,
    *,
    threshold: float,
    controversial_is_unsafe: bool,
    cut: bool,
    evidence: str,
) -> Verdict:
    """The verdict that a guard's probabilities give; `evidence` is kept of an unreadable one."""
    found, readable = tree.probabilities(logprobs)
    p_unsafe = found["unsafe"] + (found["controversial"] if controversial_is_unsafe else 0.0)
    # Written so that a NaN is unreadable.
    if not (readable >= MIN_READABLE and p_unsafe >= 0.0):
        return Verdict("unreadable", None, 0.0, readable, cut=cut, evidence=evidence)
    label: Literal["safe", "unsafe"] = "unsafe" if p_unsafe >= threshold else "safe"
    return Verdict(label, p_unsafe, found["controversial"], readable, cut=cut)


def worst(verdicts: Sequence[tuple[str, Verdict]]) -> Verdict:
    """One verdict from a guard's verdicts under several policies, by name.

    Unsafe where any is, in the categories of those; else unreadable where any is.
    """
    unsafe = [(name, found) for name, found in verdicts if found.label == "unsafe"]
    unreadable = [found for _, found in verdicts if found.label == "unreadable"]
    if unsafe:
        highest = max((found for _, found in unsafe), key=lambda found: found.p_unsafe or 0.0)
        return highest._replace(categories=tuple(name for name, _ in unsafe))
    if unreadable:
        return unreadable[0]
    return max((found for _, found in verdicts), key=lambda found: found.p_unsafe or 0.0)
