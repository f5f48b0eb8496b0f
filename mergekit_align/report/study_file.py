"""The study of a search, as a report shows it; the search may still be running."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from mergekit_align.evolve.study import Evaluation

Metric = tuple[str, str]
"""Task and metric."""


class Candidate(NamedTuple):
    """One evaluation of a search."""

    number: int
    """From 1, in the order in which evaluations were told."""
    fitness: float
    """Weighted sum of the config's metrics; `nan` where it failed."""
    evaluation: Evaluation

    def result(self, metric: Metric) -> float:
        """The value of a metric; `nan` where there is none."""
        return float(self.evaluation.results.get(metric[0], {}).get(metric[1], math.nan))


class StudyRecord(NamedTuple):
    """A search as far as it has come."""

    path: str
    config: Mapping[str, Any]
    """What makes it this search: genome, tasks, searcher, floors, seed, fingerprints."""
    genes: Sequence[tuple[str, float, float, float]]
    """Name, lowest, highest and first value of each."""
    objectives: Sequence[str]
    candidates: Sequence[Candidate]

    @property
    def best(self) -> Candidate | None:
        """The fittest feasible candidate, or the one that misses least; `None` if all failed."""
        whole = [each for each in self.candidates if each.evaluation.complete]
        return max(whole, key=lambda each: (-each.evaluation.violation, each.fitness), default=None)

    @property
    def metrics(self) -> list[Metric]:
        """Those of the config's tasks, each once."""
        return list(dict.fromkeys((each["name"], each["metric"]) for each in self.config["tasks"]))

    def weight(self, metric: Metric) -> float:
        """What a metric counts in the fitness."""
        tasks = self.config["tasks"]
        found = [each["weight"] for each in tasks if (each["name"], each["metric"]) == metric]
        return float(sum(found))


def read_study(path: str | os.PathLike[str]) -> StudyRecord:
    """The study in a journal file or at a URL of Optuna's.

    Raises:
        InputError: there is none, or it is not one of `mergekit-align-evolve`.
    """
    from mergekit_align.evolve import study  # which takes seconds, and evaluations need none of it

    where = os.fspath(path)
    config, evaluations = study.read_study(where)
    candidates = [_candidate(number, each, config) for number, each in enumerate(evaluations, 1)]
    genes = [tuple(gene) for gene in config["genes"]]
    return StudyRecord(where, config, genes, list(config["objectives"]), candidates)


def _candidate(number: int, evaluation: Evaluation, config: Mapping[str, Any]) -> Candidate:
    values = evaluation.values
    if values is None:
        fitness = math.nan
    elif len(values) == 1:
        fitness = values[0]
    else:
        fitness = sum(
            evaluation.results[task["name"]][task["metric"]] * task["weight"]
            for task in config["tasks"]
        )
    return Candidate(number, fitness, evaluation)
