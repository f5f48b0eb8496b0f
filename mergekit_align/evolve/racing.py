"""Racing: candidates see samples in growing slices, and one that does not lead stops early.

A candidate races the best one so far that has seen all samples, its *rival*. After a slice, the
difference of their fitness is known with a standard error; the candidate stops where it does not lead,
with confidence, by what all of the samples can tell: by one standard error of the difference on as many
(an indifference zone: Kim & Nelson 2001, doi 10.1145/502109.502111). Both are merges of the same
models, so that their difference varies far less than their values do, and the slices begin with the
samples that vary (see `strata`), the same ones for all of a generation. What is stopped has an
estimate: the rival's own metrics, and the estimated difference from them.

Races of an evolution strategy's candidates: Heidrich-Meisner & Igel 2009 (ICML, Hoeffding and Bernstein
races for selecting policies), whose bounds hold for any distribution and tell nothing apart before
thousands of samples. Here the bound is the normal one of a stratified sample of a finite population
(Cochran, Sampling Techniques, 3rd ed., section 5.4).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from functools import cache
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mergekit_align.errors import InputError
from mergekit_align.evolve.genes import Array
from mergekit_align.evolve.ranking import best_of
from mergekit_align.evolve.sample_values import Metric, SampleValues, Slice
from mergekit_align.evolve.strata import SHARES, Places, Stratum, stratify
from mergekit_align.tasks.response import is_response_task

if TYPE_CHECKING:
    from mergekit_align.evolve.config import EvolveConfig
    from mergekit_align.evolve.fitness import Results
    from mergekit_align.evolve.study import Evaluation

MISTAKES = 0.1
"""Share of the candidates that lead by more than that and are stopped, at most."""
_PRIOR = 2  # samples that what is known of a spread counts as
_LATEST = 4  # candidates that tell the spread: a search's differ ever less
_LOGPROB = "decision_logprob,none"


class Standing(NamedTuple):
    """What a candidate races."""

    rival: SampleValues
    spread: Mapping[Metric, Array]
    """Of each metric how much it is known to vary on every sample, [samples]. All of a generation have
    the same, and so see the same samples, as soon as there are enough to tell it."""
    generation: int
    """Each sees other samples first: one that saw the same as the last would fit those alone."""

    @classmethod
    def of(
        cls, rival: SampleValues, others: Sequence[SampleValues], generation: int = 0
    ) -> Standing:
        spread = {metric: _spread(metric, rival, others) for metric in rival}
        return cls(rival, spread, generation)


class Field:
    """The candidates of a search that have seen every sample.

    Args:
        generation: the number of candidates that are compared with each other.
    """

    def __init__(self, config: EvolveConfig, generation: int) -> None:
        self._config = config
        self._generation = generation
        self._evaluations = 0
        self._complete: list[Evaluation] = []
        self.standing: Standing | None = None
        """`None` as long as there are none, or candidates do not race."""

    def add(self, evaluation: Evaluation) -> None:
        """One more evaluation of the search."""
        self._evaluations += 1
        before, generation = self.standing, self._evaluations // self._generation
        if evaluation.samples is not None:
            self._complete.append(evaluation)
        elif before is None or before.generation == generation:
            return
        best = best_of(self._config, self._complete)
        if best is None or best.samples is None:
            return
        others = [each.samples for each in self._complete if each.samples and each is not best]
        if before is None or before.generation != generation or len(others) <= _LATEST:
            self.standing = Standing.of(best.samples, others, generation)
        else:
            self.standing = before._replace(rival=best.samples)


class _Difference(NamedTuple):
    """Of a candidate from its rival."""

    mean: float
    error: float
    """The mean's standard error, as an estimate of that on all samples."""
    error_of_all: float
    """That of the mean on all samples, as an estimate of that on any others."""


class Race:
    """Judges candidates of a config by what they have seen.

    `slices` are the samples in the order in which they are seen; a stage is the number of one.

    Args:
        tokens: that are read of a sample, by task.
    """

    def __init__(
        self, config: EvolveConfig, standing: Standing, tokens: Mapping[str, float]
    ) -> None:
        self._rival, self._spread, generation = standing
        self._floors = [((floor.task, floor.metric), floor.least) for floor in config.floors]
        self._weights: dict[Metric, float] = {}
        for task in config.file.config.tasks:
            metric = task.name, task.metric
            self._weights[metric] = self._weights.get(metric, 0.0) + task.weight
        judged = dict.fromkeys((metric for metric, _ in self._floors), 1.0)
        for metric, weight in self._weights.items():
            judged[metric] = judged.get(metric, 0.0) + abs(weight)
        names = dict.fromkeys(name for name, _ in judged)
        self._strata = stratify(
            {name: self._spread_of(_of_task(name, judged.items())) for name in names},
            tokens,
            draw=generation,
        )
        seen = np.array([each.seen for each in self._strata])
        stages = [n for n in range(len(SHARES)) if n == 0 or (seen[:, n] > seen[:, n - 1]).any()]
        self._strata_of = {
            name: _Strata.of([each for each in self._strata if each.task == name], stages)
            for name in names
        }
        self._known = cache(self._known_variance)
        self.slices = [
            self._slice(stages[n - 1] if n else None, stage) for n, stage in enumerate(stages)
        ]
        self._width = NormalDist().inv_cdf(1 - MISTAKES / max(1, len(stages) - 1))

    def against(self, rival: SampleValues) -> Race:
        """The same race, of the same samples in the same order, against another rival."""
        race = copy(self)
        race._rival = rival
        return race

    def samples(self, stage: int) -> int:
        """Number of samples seen after a slice."""
        return sum(len(each.drawn[stage][0]) for each in self._strata_of.values())

    def is_lost(self, values: SampleValues, stage: int) -> bool:
        """Whether a candidate does not lead its rival, with confidence, after a slice.

        As in the ranking, the floors come first: it is worse if it misses them by more, or if the
        rival keeps them and is as fit.
        """
        lowest = missed = 0.0
        for metric, least in self._floors:
            known = float(self._rival[metric].mean())
            difference = self._difference({metric: 1.0}, values, stage)
            missed += max(0.0, least - known)
            lowest += max(0.0, least - known - difference.mean - self._width * difference.error)
        if lowest > missed:
            return True
        difference = self._difference(self._weights, values, stage)
        highest = difference.mean + self._width * difference.error
        return missed == 0 and highest < difference.error_of_all

    def estimate(self, values: SampleValues, stage: int) -> Results:
        """The metrics of a candidate that has seen the slices up to `stage`."""
        found: Results = {}
        for name, metric in values:
            difference = self._difference({(name, metric): 1.0}, values, stage)
            whole = float(self._rival[name, metric].mean())
            found.setdefault(name, {})[metric] = whole + difference.mean
        return found

    def _slice(self, before: int | None, stage: int) -> Slice:
        places: dict[str, list[int]] = {}
        for each in self._strata:
            start = 0 if before is None else each.seen[before]
            own = each.places[start : each.seen[stage]].tolist()
            places.setdefault(each.task, []).extend(own)
        return {name: sorted(own) for name, own in places.items()}

    def _spread_of(self, weights: Mapping[Metric, float]) -> Array:
        every = [abs(weight) * self._spread[metric] for metric, weight in weights.items()]
        spread: Array = np.sum(every, axis=0)
        return spread

    def _difference(
        self, weights: Mapping[Metric, float], values: SampleValues, stage: int
    ) -> _Difference:
        """How much more a candidate has of a sum of metrics than its rival."""
        mean = variance = variance_of_all = 0.0
        for task, strata in self._strata_of.items():
            own = _of_task(task, weights.items())
            if not own:
                continue
            places, seen = strata.drawn[stage]
            differences: Array = np.sum(
                [w * (values[m][places] - self._rival[m][places]) for m, w in own.items()],
                axis=0,
            )
            means = _sums(differences, seen) / seen
            around = _sums((differences - np.repeat(means, seen)) ** 2, seen)
            known = self._known(task, tuple(own.items()))
            spread = strata.shares**2 * _variances(around, seen, known, strata.shares)
            mean += float(strata.shares @ means)
            variance += float((spread / seen * (1 - seen / strata.sizes)).sum())
            variance_of_all += float((spread / strata.sizes).sum())
        return _Difference(mean, variance**0.5, variance_of_all**0.5)

    def _known_variance(self, task: str, weights: tuple[tuple[Metric, float], ...]) -> Array:
        """Of a sum of metrics, what is known before a candidate is read, [strata]."""
        places, sizes = self._strata_of[task].places, self._strata_of[task].sizes
        known: Array = _sums(self._spread_of(dict(weights))[places] ** 2, sizes) / sizes
        return known


class _Strata(NamedTuple):
    """A task's, one after another."""

    places: Places
    """Every sample's."""
    sizes: Places
    """Samples of each."""
    shares: Array
    """Of the task's samples that each has."""
    drawn: Sequence[tuple[Places, Places]]
    """After each slice, the places of the samples seen, and the number of these of each."""

    @classmethod
    def of(cls, strata: Sequence[Stratum], stages: Sequence[int]) -> _Strata:
        """Of the strata of one task."""
        return cls(
            np.concatenate([each.places for each in strata]),
            np.array([len(each.places) for each in strata]),
            np.array([each.share for each in strata]),
            [
                (
                    np.concatenate([each.places[: each.seen[n]] for each in strata]),
                    np.array([each.seen[n] for each in strata]),
                )
                for n in stages
            ],
        )


def _variances(around: Array, seen: Places, known: Array, shares: Array) -> Array:
    """Of each of a task's strata, by the samples seen and by what is known, which counts as some more.

    A few samples that are alike say little of what varies seldom, such as a decision. What is known
    tells how the strata compare. How much they vary in all is the samples' to tell: a search's first
    candidates differ far more than its last.

    Args:
        around: sum of the squared deviations from the stratum's mean.
    """
    matters = shares**2 / seen  # to the mean's variance
    prior = _PRIOR * (matters * known).mean()
    expected = matters @ ((seen - 1) * known) + prior
    scale = (matters @ around + prior) / expected if expected else 1.0
    variances: Array = (around + _PRIOR * scale * known) / (seen - 1 + _PRIOR)
    return variances


def _sums(values: Array, sizes: Places) -> Array:
    """Of groups of such sizes, one after another, none of them empty."""
    sums: Array = np.add.reduceat(values, np.cumsum(sizes) - sizes)
    return sums


def check_racing(config: EvolveConfig) -> None:
    """That the candidates of a config can race.

    Raises:
        InputError: a task has no value by sample, or the searcher asks for more than a fitness.
    """
    key = "align.racing"
    if config.by_gradient:
        raise InputError.at(
            config.path,
            key,
            found=f"it with the searcher {config.searcher}, which needs every sample's gradient",
            expected="the searcher cma, tpe, random or grid, or `racing: off`",
        )
    if config.objectives:
        raise InputError.at(
            config.path, key, found="it with `objectives`", expected="one fitness, and `floors`"
        )
    for name, loaded in config.file.loaded.items():
        if not is_response_task(loaded):
            raise InputError.at(
                config.path,
                key,
                found=f"it with the task {name}, whose samples have no values of their own",
                expected="response tasks alone, or `racing: off`",
            )


def racing_metrics(config: EvolveConfig) -> list[Metric]:
    """What is read of samples beside what is scored: how certain a decision is."""
    scored = [(task.name, task.metric) for task in config.file.config.tasks]
    scored += [(floor.task, floor.metric) for floor in config.floors]
    return [(name, _LOGPROB) for name, metric in scored if metric.startswith("decision_acc,")]


def _spread(metric: Metric, rival: SampleValues, others: Sequence[SampleValues]) -> Array:
    """How far others are from the rival on each sample: few tell, so that uncertainty tells as much."""
    others = others[-_LATEST:]
    unsure: Array = np.mean([_uncertainty(metric, each) for each in [rival, *others]], axis=0)
    if not others:
        return unsure
    far = np.array([each[metric] - rival[metric] for each in others])
    known: Array = np.sqrt((far**2).mean(axis=0))
    # Of the same size: how uncertain a sample is says where candidates differ, not by how much.
    size = float(np.sqrt((unsure**2).mean())) or 1.0
    return (known + unsure * (float(np.sqrt((known**2).mean())) / size)) / 2


def _uncertainty(metric: Metric, values: SampleValues) -> Array:
    """How much a candidate's value on each sample may be another's, as far as it can be told."""
    own = values[metric]
    if metric[1].startswith("decision_acc,"):
        certain = np.exp(values[metric[0], _LOGPROB])
        deviation: Array = np.sqrt(certain * (1 - certain))
        return deviation
    if "logprob" in metric[1]:
        return np.abs(own)  # what is certain stays so
    return np.full(len(own), own.std())


def _of_task(task: str, weights: Iterable[tuple[Metric, float]]) -> dict[Metric, float]:
    return {metric: weight for metric, weight in weights if metric[0] == task}
