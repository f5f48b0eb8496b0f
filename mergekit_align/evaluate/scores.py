"""Scores of models on the same prompts, with 95% intervals.

A rate has Wilson's interval (Wilson 1927; Brown, Cai and DasGupta 2001), which is right near 0 and 1,
where alignment lives. Any other mean has that of its standard error. The difference of two models is
taken prompt by prompt over the prompts that are scored of both, and its interval is the percentile
bootstrap's: two models that answer alike differ by far less than their own intervals suggest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 10_000
_BATCH = 10_000_000  # numbers drawn at once: 80 MB
_Z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))

Outcomes = Sequence[float | None]
"""One number a prompt; `None` where it could not be scored, which keeps it out of every score."""


class Difference(NamedTuple):
    """A model's score less the first model's."""

    value: float
    low: float
    high: float
    n: int | None
    """Prompts that are scored of both; `None` where the outcomes were not paired."""


class Score(NamedTuple):
    """A model's score in one column, as a share (not in percent) where it is a rate."""

    value: float
    """`nan` where nothing was scored."""
    low: float
    high: float
    k: int | None
    """Successes, of a rate."""
    n: int
    """Prompts that were scored."""
    unscored: int = 0
    """Prompts that could not be: those without a readable verdict."""
    difference: Difference | None = None
    """`None` for the first model."""


class Reported(NamedTuple):
    """A score that someone else has made of the outcomes, and its standard error (may be `nan`)."""

    value: float
    stderr: float


class Column(NamedTuple):
    """One measure of every model."""

    title: str
    """What is measured, for a reader."""
    is_rate: bool
    """Whether it is a share of prompts, to be shown in percent."""
    outcomes: Mapping[str, Outcomes]
    """Of each model, by name, in the same order of prompts."""
    scores: Mapping[str, Score]
    """Of each model, by name."""


def make_column(
    title: str,
    outcomes: Mapping[str, Outcomes],
    *,
    reported: Mapping[str, Reported] | None = None,
    seed: int = 0,
) -> Column:
    """Scores of models, by name, the first being what the others are compared with.

    Args:
        outcomes: of each model; empty where its score has no parts.
        reported: scores that stand where they are not the mean of the outcomes.
        seed: of the bootstrap.
    """
    is_rate = all(
        value in (None, 0.0, 1.0) for values in outcomes.values() for value in values
    ) and any(outcomes.values())
    first = next(iter(outcomes))
    scores: dict[str, Score] = {}
    means: dict[str, bool] = {}
    for name, values in outcomes.items():
        known = [value for value in values if value is not None]
        mean = sum(known) / len(known) if known else math.nan
        given = (reported or {}).get(name)
        means[name] = given is None or math.isclose(given.value, mean, abs_tol=1e-6)
        score = _score(known, mean, is_rate) if means[name] else _reported(given, len(known))
        scores[name] = score._replace(unscored=len(values) - len(known))
        if name == first:
            continue
        if means[name] and means[first]:
            found = paired_difference(values, outcomes[first], seed=seed)
        else:
            found = _unpaired(scores[name], scores[first])
        scores[name] = scores[name]._replace(difference=found)
    return Column(title, is_rate, outcomes, scores)


def wilson(k: int, n: int) -> tuple[float, float]:
    """Wilson's interval of the rate k/n; `nan` where n is 0."""
    if n == 0:
        return math.nan, math.nan
    low, high = stats.binomtest(k, n).proportion_ci(CONFIDENCE, "wilson")
    return float(low), float(high)


def paired_difference(values: Outcomes, others: Outcomes, *, seed: int) -> Difference:
    """Mean of `values` less that of `others` over the prompts that are scored in both.

    The bootstrap's interval shrinks to the value where all prompts differ alike.
    """
    pairs = zip(values, others, strict=True)
    differences = np.array([a - b for a, b in pairs if a is not None and b is not None])
    if not len(differences):
        return Difference(math.nan, math.nan, math.nan, 0)
    value = float(differences.mean())
    if np.all(differences == differences[0]):
        return Difference(value, value, value, len(differences))
    interval = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, _BATCH // len(differences)),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Difference(value, float(interval.low), float(interval.high), len(differences))


def _score(known: Sequence[float], mean: float, is_rate: bool) -> Score:
    if is_rate:
        return Score(mean, *wilson(round(sum(known)), len(known)), round(sum(known)), len(known))
    stderr = float(np.std(known, ddof=1)) / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return Score(mean, mean - _Z * stderr, mean + _Z * stderr, None, len(known))


def _reported(given: Reported | None, n: int) -> Score:
    assert given is not None
    half = _Z * given.stderr
    return Score(given.value, given.value - half, given.value + half, None, n)


def _unpaired(score: Score, other: Score) -> Difference:
    """From the two standard errors: too wide where the models agree, never too narrow for that."""
    half = math.hypot(score.high - score.value, other.high - other.value)
    value = score.value - other.value
    return Difference(value, value - half, value + half, None)
