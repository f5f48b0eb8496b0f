"""Searchers by name."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from mergekit_align.evolve.searchers.base import Outcome, Searcher, Space

if TYPE_CHECKING:
    from mergekit_align.align_section import AlignSection

SEARCHERS = ("adam", "cma", "gradient", "grid", "nsga2", "random", "tpe")
BY_GRADIENT = ("adam", "gradient")
"""Those that need a fitness with a gradient."""
MULTI_OBJECTIVE = ("grid", "nsga2", "random", "tpe")
"""Those that take more than one objective."""


def make_searcher(name: str, space: Space, section: AlignSection) -> Searcher:
    """The searcher of that name, one of `SEARCHERS`; what it needs is imported with it."""
    seed = section.random_seed or 0
    population = section.force_population_size
    if name in BY_GRADIENT:
        from mergekit_align.evolve.searchers.gradient import AdamSearcher, GradientSearcher

        return (AdamSearcher if name == "adam" else GradientSearcher)(space, seed=seed)
    if name == "grid":
        from mergekit_align.evolve.searchers.grid import GridSearcher

        return GridSearcher(space, points=section.grid_points)
    if name == "cma":
        from mergekit_align.evolve.searchers.cma import CmaSearcher

        return CmaSearcher(space, seed=seed, sigma=section.sigma0 or 1 / 6, population=population)

    from optuna.exceptions import ExperimentalWarning

    from mergekit_align.evolve.searchers.optuna import Nsga2Searcher, RandomSearcher, TpeSearcher

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # of samplers' options
        if name == "nsga2":
            return Nsga2Searcher(space, seed=seed, population=population)
        return TpeSearcher(space, seed=seed) if name == "tpe" else RandomSearcher(space, seed=seed)


__all__ = [
    "BY_GRADIENT",
    "MULTI_OBJECTIVE",
    "SEARCHERS",
    "Outcome",
    "Searcher",
    "Space",
    "make_searcher",
]
