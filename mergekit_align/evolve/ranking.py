"""Which of a search's evaluations is the best."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mergekit_align.evolve.study import Evaluation

if TYPE_CHECKING:
    from mergekit_align.evolve.config import EvolveConfig


def best_of(config: EvolveConfig, evaluations: list[Evaluation]) -> Evaluation | None:
    """The feasible evaluation of the highest fitness, else the one that misses its floors least.

    None that was stopped early: its values are estimates.
    """
    scored = [each for each in evaluations if each.complete]

    def rank(evaluation: Evaluation) -> tuple[float, float]:
        return (-evaluation.violation, fitness_of(config, evaluation))

    return max(scored, key=rank, default=None)


def fitness_of(config: EvolveConfig, evaluation: Evaluation) -> float:
    """The weighted sum of the config's metrics; with `objectives` it is not what was searched for."""
    if evaluation.values is None:
        return -math.inf
    if not config.objectives:
        return evaluation.values[0]
    return float(
        sum(
            evaluation.results[task.name][task.metric] * task.weight
            for task in config.file.config.tasks
        )
    )


def dominates(one: Evaluation, other: Evaluation) -> bool:
    """Whether it is as good in every objective, and better in one."""
    pairs = list(zip(one.values or (), other.values or (), strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)
