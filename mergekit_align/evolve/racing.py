"""Racing: candidates see the same samples in growing slices, and one that is losing stops early.

A candidate races the best one so far that has seen all samples, its *rival*. After a slice, the
difference of their fitness on the samples that both have seen is known with a standard error; where it
is below zero with confidence, the candidate stops. Both are merges of the same models, so that their
differences vary far less than their values do, and the samples are a part of a finite set, of which
the last slice leaves nothing unknown. What is stopped has an estimate: the rival's own mean over all
samples, and the mean difference from it.

Races of an evolution strategy's candidates: Heidrich-Meisner & Igel 2009 (ICML, Hoeffding and Bernstein
races for selecting policies), whose bounds hold for any distribution and tell nothing apart before
thousands of samples; here the bound is the normal one of a stratified sample of a finite population
(Cochran, Sampling Techniques, 3rd ed., sections 5.4 and 7.3), a task being a stratum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mergekit_align.errors import InputError
from mergekit_align.evolve.genes import Array
from mergekit_align.evolve.sample_values import Metric, SampleValues, Slice
from mergekit_align.tasks import ResponseTask

if TYPE_CHECKING:
    from mergekit_align.evolve.config import EvolveConfig, Floor
    from mergekit_align.evolve.fitness import Results

SHARES = (1 / 8, 1 / 4, 1 / 2, 1)
"""Share of every task's samples that a candidate has seen after each slice."""
LEAST = 8
"""Samples of every task in the first slice, at least: fewer tell no variance."""
MISTAKES = 0.05
"""Share of the candidates as good as their rival that are stopped, at most."""


def check_racing(config: EvolveConfig) -> None:
    """That the candidates of a config can race.

    Raises:
        InputError: a task has no value by sample, or the searcher asks for more than a fitness.
    """
    key = "align.racing"
    if config.searcher == "gradient":
        raise InputError.at(
            config.path,
            key,
            found="it with the searcher gradient, which needs every sample's gradient,",
            expected="the searcher cma, random, tpe or grid",
        )
    if config.objectives:
        raise InputError.at(
            config.path, key, found="it with `objectives`", expected="one fitness and `floors`"
        )
    for name, loaded in config.file.loaded.items():
        if not all(isinstance(task, ResponseTask) for task in loaded["tasks"].values()):
            raise InputError.at(
                config.path,
                key,
                found=f"it with the task {name}, whose samples have no value of their own",
                expected="response tasks alone, or `racing: off`",
            )


def make_slices(sizes: Mapping[str, int]) -> list[Slice]:
    """Places of every task's samples, each once, in slices that all tasks have their share of.

    Samples are drawn at random, the same at every call: files may be sorted.
    """
    orders = {
        name: np.random.default_rng(0).permutation(size).tolist() for name, size in sizes.items()
    }
    ends = [
        {name: min(size, max(round(share * size), LEAST)) for name, size in sizes.items()}
        for share in SHARES
    ]
    starts = [dict.fromkeys(sizes, 0), *ends]
    slices: list[Slice] = [
        {name: sorted(orders[name][start[name] : end[name]]) for name in sizes}
        for start, end in zip(starts[:-1], ends, strict=True)
    ]
    return [each for each in slices if any(each.values())]


class _Difference(NamedTuple):
    """How much more a candidate has of something than its rival."""

    mean: float
    error: float
    """Standard error."""


class Race:
    """Judges candidates of a config by what they have seen.

    Args:
        weights: of the fitness's metrics.
        slices: in the order in which they are read.
    """

    def __init__(
        self, weights: Mapping[Metric, float], floors: Sequence[Floor], slices: Sequence[Slice]
    ) -> None:
        self._weights = weights
        self._floors = floors
        self._seen: list[dict[str, list[int]]] = []
        for each in slices:
            before = self._seen[-1] if self._seen else {}
            self._seen.append(
                {name: before.get(name, []) + list(own) for name, own in each.items()}
            )
        self._width = NormalDist().inv_cdf(1 - MISTAKES / max(1, len(slices) - 1))

    def samples(self, stage: int) -> int:
        """Number of samples seen after a slice."""
        return sum(map(len, self._seen[stage].values()))

    def is_lost(self, values: SampleValues, rival: SampleValues, stage: int) -> bool:
        """Whether a candidate is worse than its rival, with confidence, after a slice.

        As in the ranking, the floors come first: it is worse if it misses them by more, or if the
        rival keeps them and is fitter.
        """
        least = missed = 0.0
        for floor in self._floors:
            metric = floor.task, floor.metric
            known = float(rival[metric].mean())
            more = self._difference({metric: 1.0}, values, rival, stage)
            missed += max(0.0, floor.least - known)
            least += max(0.0, floor.least - known - more.mean - self._width * more.error)
        if least > missed:
            return True
        fitter = self._difference(self._weights, values, rival, stage)
        return missed == 0 and fitter.mean + self._width * fitter.error < 0

    def estimate(self, values: SampleValues, rival: SampleValues, stage: int) -> Results:
        """The metrics of a candidate that has seen the slices up to `stage`."""
        found: Results = {}
        for name, metric in values:
            difference = self._difference({(name, metric): 1.0}, values, rival, stage)
            whole = float(rival[name, metric].mean())
            found.setdefault(name, {})[metric] = whole + difference.mean
        return found

    def _difference(
        self, weights: Mapping[Metric, float], values: SampleValues, rival: SampleValues, stage: int
    ) -> _Difference:
        mean = variance = 0.0
        for name in dict.fromkeys(task for task, _ in weights):
            seen = self._seen[stage][name]
            own = {metric: weight for metric, weight in weights.items() if metric[0] == name}
            differences: Array = sum(
                (weight * (values[each][seen] - rival[each][seen]) for each, weight in own.items()),
                start=np.zeros(len(seen)),
            )
            size = len(values[next(iter(own))])
            spread = max(float(differences.var(ddof=1)), _least_variance(own.items(), len(seen)))
            mean += float(differences.mean())
            variance += spread / len(seen) * (1 - len(seen) / size)
        return _Difference(mean, variance**0.5)


def _least_variance(weights: Iterable[tuple[Metric, float]], seen: int) -> float:
    """As if on one of the samples a decision were another: none that is seen says little of a rate."""
    return sum(
        weight**2 / seen for (_, metric), weight in weights if metric.startswith("decision_acc,")
    )
