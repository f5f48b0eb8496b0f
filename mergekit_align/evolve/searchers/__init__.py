"""Searchers by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_align.evolve.searchers.base import Outcome, Searcher, Space

if TYPE_CHECKING:
    from mergekit_align.align_section import AlignSection

SEARCHERS = ("cma", "gradient", "grid")


def make_searcher(name: str, space: Space, section: AlignSection) -> Searcher:
    """The searcher of that name, one of `SEARCHERS`; what it needs is imported with it."""
    seed = section.random_seed or 0
    if name == "gradient":
        from mergekit_align.evolve.searchers.gradient import GradientSearcher

        return GradientSearcher(space, seed=seed)
    if name == "grid":
        from mergekit_align.evolve.searchers.grid import GridSearcher

        return GridSearcher(space, points=section.grid_points)
    from mergekit_align.evolve.searchers.cma import CmaSearcher

    return CmaSearcher(
        space, seed=seed, sigma=section.sigma0 or 1 / 6, population=section.force_population_size
    )


__all__ = ["SEARCHERS", "Outcome", "Searcher", "Space", "make_searcher"]
