"""What every searcher is: it asks for candidates and is told what became of them.

A *genotype* is a candidate's genes, a flat vector within the genes' bounds. An *outcome* is what its
evaluation gave: objectives to be maximised, and for each constraint how far it is missed, feasible
meaning <= 0. A searcher may be asked several times before it is told anything, and be told in
any order. It knows nothing of the clock and draws from its own seeded generator, so that the same
asks and tells lead to the same candidates: that is how a study resumes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mergekit_align.evolve.genes import Array, Gene, Genotype


class Outcome(NamedTuple):
    """What an evaluation gave."""

    values: tuple[float, ...] | None
    """To be maximised, one an objective; `None` of a candidate that failed."""
    violations: tuple[float, ...] = ()
    """How far each constraint is missed; feasible means <= 0."""
    gradient: Array | None = None
    """Of the first value, and then of every violation, [1 + violations, genes]."""

    @property
    def violation(self) -> float:
        """Sum of what is missed; 0 means feasible."""
        return sum(max(0.0, each) for each in self.violations)


class Space(NamedTuple):
    """Where a searcher looks."""

    genes: Sequence[Gene]
    objectives: int = 1
    constraints: int = 0
    random_start: bool = False
    """Start anywhere within the bounds in place of at the genes' start."""

    @property
    def start(self) -> Genotype:
        return np.array([gene.start for gene in self.genes])

    @property
    def low(self) -> Array:
        return np.array([gene.low for gene in self.genes])

    @property
    def high(self) -> Array:
        return np.array([gene.high for gene in self.genes])


class Searcher(ABC):
    """Asks for candidates; see the module."""

    generation = 10
    """Candidates that are compared with each other, as far as any are."""

    @abstractmethod
    def ask(self) -> Genotype | None:
        """The next candidate; `None` when there is nothing more to try, or not until more is told."""

    @abstractmethod
    def tell(self, genotype: Genotype, outcome: Outcome) -> None:
        """What became of a candidate that was asked for."""
