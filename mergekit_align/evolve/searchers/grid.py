"""All combinations of evenly spaced values."""

from __future__ import annotations

from itertools import islice, product

import numpy as np

from mergekit_align.evolve.genes import Genotype
from mergekit_align.evolve.searchers.base import Outcome, Searcher, Space


class GridSearcher(Searcher):
    """Every combination of `points` values of each gene, its bounds included.

    The last gene changes fastest, so that most of a candidate is often what the one before was.
    """

    def __init__(self, space: Space, *, points: int) -> None:
        self._combinations = product(
            *(np.linspace(gene.low, gene.high, points) for gene in space.genes)
        )

    def ask(self) -> Genotype | None:
        return next((np.array(each) for each in islice(self._combinations, 1)), None)

    def tell(self, genotype: Genotype, outcome: Outcome) -> None:
        pass
