"""CMA-ES (Hansen's `cma` package), the stock command's searcher, with bounds and constraints."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from mergekit_align.evolve.genes import Genotype
from mergekit_align.evolve.searchers.base import Outcome, Searcher, Space


@contextmanager
def _absent(*modules: str) -> Iterator[None]:
    """Modules that are not imported yet are not found: `cma` goes without them, and starts at once."""
    absent = [name for name in modules if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


class CmaSearcher(Searcher):
    """Generations of candidates around a mean that moves to the better ones.

    Feasible candidates are ranked by their value and come before the infeasible, which are ranked by
    how much they miss (Deb 2000, doi 10.1016/S0045-7825(99)00389-8); what failed comes last. Where
    candidates are asked for faster than a generation is told, more are drawn from the same
    distribution. Bounds are the package's own, `BoundTransform`. Its `NoiseHandler` is not used for the
    estimates of candidates that stopped early: it pays for second evaluations of what the race found
    to be worse, and with 100 evaluations ends lower than without.

    Args:
        sigma: the initial step.
        population: candidates a generation; by default by the number of genes.
    """

    def __init__(
        self, space: Space, *, seed: int, sigma: float = 1 / 6, population: int | None = None
    ) -> None:
        with warnings.catch_warnings(), _absent("scipy.stats", "matplotlib", "matplotlib.pyplot"):
            warnings.simplefilter("ignore")  # that it cannot plot
            import cma

        rng = np.random.default_rng(seed)
        start = rng.uniform(space.low, space.high) if space.random_start else space.start
        options = {
            "bounds": [space.low.tolist(), space.high.tolist()],
            # Of its own: merge methods and tasks seed the global generators again and again.
            "randn": lambda *shape: rng.standard_normal(shape),
            "seed": math.nan,
            "verbose": -9,
            "verb_log": 0,
        }
        if population is not None:
            options["popsize"] = population
        self._strategy = cma.CMAEvolutionStrategy(start, sigma, options)
        self.generation = int(self._strategy.popsize)
        self._queue: list[Genotype] = []
        self._told: list[tuple[Genotype, Outcome]] = []

    def ask(self) -> Genotype | None:
        if not self._queue:
            if self._strategy.stop():
                return None
            self._queue = [np.array(each) for each in self._strategy.ask()]
        return self._queue.pop(0)

    def tell(self, genotype: Genotype, outcome: Outcome) -> None:
        self._told.append((genotype, outcome))
        if len(self._told) < self.generation:
            return
        told, self._told = self._told, []
        if any(each.values is not None for _, each in told):
            self._strategy.tell([each for each, _ in told], _costs([each for _, each in told]))
            self._queue = []  # of the distribution that was


def _costs(outcomes: list[Outcome]) -> list[float]:
    """What CMA-ES minimises: values, or ranks where a candidate is infeasible or failed."""
    if all(each.values is not None and not each.violation for each in outcomes):
        return [-each.values[0] for each in outcomes if each.values is not None]

    def key(outcome: Outcome) -> tuple[float, float]:
        if outcome.values is None:
            return math.inf, math.inf
        return outcome.violation, -outcome.values[0]

    order = sorted({key(each) for each in outcomes})
    return [float(order.index(key(each))) for each in outcomes]
