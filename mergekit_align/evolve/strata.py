"""Which samples are read first: those that tell candidates apart.

Of most samples every candidate makes the same, and a few make nearly all of the difference. A task's
samples are ranked by how much they are known to vary from candidate to candidate, and cut into strata;
a slice has of every stratum as much as its size and spread are worth, for what its samples cost
(Cochran, Sampling Techniques, 3rd ed., section 5.5), drawn at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mergekit_align.evolve.genes import Array

SHARES = (1 / 12, 1 / 6, 1 / 3, 1)
"""Share of all that reading the samples costs, that has been spent after each slice."""
CUTS = (0.05, 0.1, 0.2, 0.4)
"""Share of a task's samples that vary more than those of each next stratum."""
LEAST = 2
"""Samples of every stratum in the first slice, at least."""
_CALM = 0.2  # of the mean: no sample is taken to vary less
_STILL = 1e-100  # where none varies at all

Places = NDArray[Any]
"""Which samples of a task, integers."""


class Stratum(NamedTuple):
    """Samples of a task that vary alike."""

    task: str
    places: Places
    """In the order in which they are read."""
    share: float
    """Of the task's samples."""
    seen: tuple[int, ...]
    """Number that is read after each slice."""


def stratify(
    spread: Mapping[str, Array], cost: Mapping[str, float], *, draw: int = 0
) -> list[Stratum]:
    """The samples of all tasks, each in one stratum.

    Args:
        spread: of every sample of a task how much it varies, in units of the fitness, [samples].
        cost: of a task's samples, each, in any unit.
        draw: seeds which samples of a stratum are read first.
    """
    total = sum(cost[name] * len(own) for name, own in spread.items())
    found: list[tuple[str, Places, float]] = []
    for name, own in spread.items():
        # Samples that are alike are drawn at random too: files may be sorted.
        order = np.random.default_rng(draw).permutation(len(own))
        ranked = order[np.argsort(-own[order], kind="stable")]
        for part in np.split(ranked, [round(cut * len(own)) for cut in CUTS]):
            drawn = np.random.default_rng(draw).permutation(part)
            if len(drawn):
                calm = np.maximum(own[drawn], _CALM * own.mean())
                found.append((name, drawn, float(np.sqrt((calm**2).mean())) / len(own)))
    sizes = np.array([len(places) for _, places, _ in found])
    costs = np.array([cost[name] for name, _, _ in found])
    spreads = np.array([max(each, _STILL) for _, _, each in found])
    worth = sizes * spreads / np.sqrt(costs)
    seen = np.maximum.accumulate(
        [_allocate(sizes, worth, costs, share * total) for share in SHARES]
    )
    return [
        Stratum(name, places, len(places) / len(spread[name]), tuple(own))
        for (name, places, _), own in zip(found, seen.T.tolist(), strict=True)
    ]


def _allocate(sizes: Places, worth: Array, costs: Array, budget: float) -> Places:
    """How many samples of each stratum, for about `budget`, by worth as far as there are any."""
    wanted = np.zeros(len(sizes))
    free = np.full(len(sizes), True)
    while free.any():
        each = np.where(free, worth, 0.0)
        each *= max(0.0, budget - (costs * wanted)[~free].sum()) / (costs * each).sum()
        spent = free & (each >= sizes)
        if not spent.any():
            wanted[free] = each[free]
            break
        wanted[spent] = sizes[spent]
        free &= ~spent
    allocated: Places = np.clip(np.round(wanted).astype(int), np.minimum(sizes, LEAST), sizes)
    return allocated
