"""Optuna's samplers: NSGA-II for several objectives, TPE, and random search."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mergekit_align.evolve.genes import Genotype
from mergekit_align.evolve.searchers.base import Outcome, Searcher, Space

if TYPE_CHECKING:
    import optuna


class OptunaSearcher(Searcher):
    """A sampler of Optuna's on a study of its own, in memory; the first candidate is the start."""

    def __init__(self, space: Space, sampler: optuna.samplers.BaseSampler) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        self._study = optuna.create_study(
            directions=["maximize"] * space.objectives, sampler=sampler
        )
        self._distributions: dict[str, optuna.distributions.BaseDistribution] = {
            gene.name: optuna.distributions.FloatDistribution(gene.low, gene.high)
            for gene in space.genes
        }
        self._pending: list[tuple[Genotype, optuna.Trial]] = []
        if not space.random_start:
            self._study.enqueue_trial({gene.name: gene.start for gene in space.genes})

    def ask(self) -> Genotype | None:
        trial = self._study.ask(self._distributions)
        genotype = np.array([trial.params[gene.name] for gene in self._space.genes])
        self._pending.append((genotype, trial))
        return genotype

    def tell(self, genotype: Genotype, outcome: Outcome) -> None:
        from optuna.trial import TrialState

        place = next(
            index
            for index, (asked, _) in enumerate(self._pending)
            if np.array_equal(asked, genotype)
        )
        _, trial = self._pending.pop(place)
        if outcome.values is None:
            self._study.tell(trial, state=TrialState.FAIL)
            return
        for index, missed in enumerate(outcome.violations):
            trial.set_constraint(str(index), missed)
        self._study.tell(trial, list(outcome.values))


class Nsga2Searcher(OptunaSearcher):
    """NSGA-II (Deb et al. 2002): a population that spreads along the Pareto front."""

    def __init__(self, space: Space, *, seed: int, population: int | None) -> None:
        from optuna.samplers import NSGAIISampler

        super().__init__(space, NSGAIISampler(population_size=population or 24, seed=seed))


class TpeSearcher(OptunaSearcher):
    """Tree-structured Parzen estimators, of all genes together."""

    def __init__(self, space: Space, *, seed: int) -> None:
        from optuna.samplers import TPESampler

        super().__init__(space, TPESampler(seed=seed, multivariate=True, constant_liar=True))


class RandomSearcher(OptunaSearcher):
    """Candidates anywhere within the bounds."""

    def __init__(self, space: Space, *, seed: int) -> None:
        from optuna.samplers import RandomSampler

        super().__init__(space, RandomSampler(seed=seed))
