"""The study of a search, read by Optuna's public interface while the search may still be running."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_align.errors import InputError
from mergekit_align.evolve.study import NAME

if TYPE_CHECKING:
    import optuna

Metric = tuple[str, str]
"""Task and metric."""


class Candidate(NamedTuple):
    """One evaluation of a search."""

    number: int
    """From 1, in the order in which evaluations were told."""
    genotype: tuple[float, ...]
    values: tuple[float, ...] | None
    """Objectives, to be maximised; `None` where it failed."""
    fitness: float
    """Weighted sum of the config's metrics; `nan` where it failed."""
    violation: float
    """Sum of what is missed of the floors; 0 means feasible."""
    results: Mapping[str, Mapping[str, float]]
    """Each task's metrics."""
    seconds: float
    failure: str | None
    stopped: bool = False
    """Whether it lost its race early: its numbers are estimates then."""

    @property
    def complete(self) -> bool:
        """Whether it was scored on all samples."""
        return self.values is not None and not self.stopped

    def result(self, metric: Metric) -> float:
        """The value of a metric; `nan` where there is none."""
        return float(self.results.get(metric[0], {}).get(metric[1], math.nan))


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
        whole = [each for each in self.candidates if each.complete]
        return max(whole, key=lambda each: (-each.violation, each.fitness), default=None)

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
    where = os.fspath(path)
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.load_study(study_name=NAME, storage=_storage(where))
        config = study.user_attrs["config"]
        genes = [tuple(gene) for gene in config["genes"]]
        trials = study.get_trials(deepcopy=False)
        candidates = [_candidate(number, each, config) for number, each in enumerate(trials, 1)]
        return StudyRecord(where, config, genes, list(config["objectives"]), candidates)
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"{where}: found no study of mergekit-align-evolve ({type(error).__name__}: {error}); "
            "expected one"
        ) from error


def _storage(where: str) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    if "://" in where:
        return where
    # Optuna would make the file.
    if not Path(where).is_file():
        raise InputError(f"{where}: found no such file; expected a study or an evaluation")
    return JournalStorage(JournalFileBackend(where))


def _candidate(
    number: int, trial: optuna.trial.FrozenTrial, config: Mapping[str, Any]
) -> Candidate:
    attributes = trial.user_attrs
    values = None if trial.values is None else tuple(trial.values)
    results = attributes["results"]
    if values is None:
        fitness = math.nan
    elif len(values) == 1:
        fitness = values[0]
    else:
        fitness = sum(
            results[task["name"]][task["metric"]] * task["weight"] for task in config["tasks"]
        )
    return Candidate(
        number,
        tuple(attributes["genotype"]),
        values,
        fitness,
        sum(max(0.0, each) for each in attributes["violations"]),
        results,
        attributes["seconds"],
        attributes.get("failure"),
        "stopped" in attributes,
    )
