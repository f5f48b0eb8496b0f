"""What a search remembers: every evaluation, appended when it is done, in a store of Optuna's.

A finished evaluation is one trial and, in a journal file, one line, so that a kill can lose no more
than the line that is being written. What a searcher knows is not stored: it follows from its seed and
the evaluations, in the order in which they were asked for and told.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mergekit_align.errors import InputError, one_line
from mergekit_align.evolve.compact import read_compact, write_compact

if TYPE_CHECKING:
    import optuna

    from mergekit_align.evolve.genes import Array, Gene, Genotype
    from mergekit_align.evolve.sample_values import SampleValues

NAME = "mergekit-align-evolve"
_CONFIG = "config"


class Evaluation(NamedTuple):
    """One candidate's evaluation, as it is remembered."""

    genotype: Genotype
    asked: int
    """Which ask it answers, from 0."""
    asks: int
    """Asks there had been when it was told: `asked + 1` with one worker."""
    values: tuple[float, ...] | None
    """Objectives, to be maximised; `None` where it failed."""
    violations: tuple[float, ...]
    """How far each constraint is missed; feasible means <= 0."""
    results: Mapping[str, Mapping[str, float]]
    """Each task's metrics."""
    seconds: float
    seed: int
    """Of random merge methods' draws."""
    failure: str | None = None
    """Why it failed."""
    gradient: Array | None = None
    """Of the first value and of every violation, [1 + violations, genes]."""
    stopped: int | None = None
    """Samples after which it lost its race; values, violations and results are estimates then."""
    samples: SampleValues | None = None
    """What it made of every sample, where candidates race and it was not stopped."""

    @property
    def complete(self) -> bool:
        """Whether it was scored on all samples."""
        return self.values is not None and self.stopped is None

    @property
    def violation(self) -> float:
        """Sum of what is missed; 0 means feasible."""
        return sum(max(0.0, each) for each in self.violations)


class Study:
    """An open store; made by `open_study`."""

    def __init__(self, study: optuna.Study, genes: Sequence[Gene]) -> None:
        self._study = study
        self._genes = genes
        self.evaluations: list[Evaluation] = [_evaluation(each) for each in study.trials]

    def add(self, evaluation: Evaluation) -> None:
        """Remember an evaluation: when this returns it is on disk."""
        self._study.add_trial(_trial(evaluation, self._genes))
        self.evaluations.append(evaluation)


@contextmanager
def open_study(
    where: str,
    genes: Sequence[Gene],
    config: Mapping[str, Any],
    *,
    objectives: int = 1,
    resume: bool = False,
    lock: str | os.PathLike[str],
) -> Iterator[Study]:
    """The study at `where`, for one run at a time.

    Args:
        where: a journal file, or a URL of Optuna's (`sqlite:///...`).
        config: what an earlier run of the study must have had too, as JSON has it.
        objectives: how many values an evaluation has.
        resume: whether there may be evaluations already.
        lock: a file that a run holds.

    Raises:
        InputError: another run has it, it is no study, its config was another, or there is one and
            `resume` does not say to go on with it.
    """
    import optuna
    from filelock import FileLock, Timeout
    from optuna.exceptions import ExperimentalWarning

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"{where}: found another run on this study; expected none") from error
    try:
        storage = _storage(where)
        names = [each.study_name for each in storage.get_all_studies()]
        if NAME in names:
            study = optuna.load_study(study_name=NAME, storage=storage)
            if study.trials and not resume:
                raise InputError(
                    f"{where}: found a study of {len(study.trials)} evaluations; expected none "
                    "without --resume"
                )
            _check_same(where, study.user_attrs.get(_CONFIG), config)
        else:
            study = optuna.create_study(
                study_name=NAME, storage=storage, directions=["maximize"] * objectives
            )
        if _CONFIG not in study.user_attrs:
            study.set_user_attr(_CONFIG, config)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                study.set_metric_names(list(config["objectives"]))
        yield Study(study, genes)
    finally:
        held.release()


def read_study(where: str) -> tuple[Mapping[str, Any], list[Evaluation]]:
    """The config and the evaluations of a search, which may still be running.

    Raises:
        InputError: there is no study.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if "://" not in where and not Path(where).is_file():
        raise InputError(f"{where}: found no such file; expected the study of a search")
    try:
        study = optuna.load_study(study_name=NAME, storage=_storage(where, repair=False))
        return study.user_attrs[_CONFIG], [_evaluation(each) for each in study.trials]
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"{where}: found no study of mergekit-align-evolve ({type(error).__name__}: {error}); "
            "expected one"
        ) from error


def _storage(where: str, *, repair: bool = True) -> optuna.storages.BaseStorage:
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    if "://" in where:
        from sqlalchemy.exc import SQLAlchemyError

        try:
            return RDBStorage(where)
        except (SQLAlchemyError, ImportError) as error:
            reason = one_line(error)
            raise InputError(f"align.study: found {where} ({reason}); expected a store") from error
    if repair:
        Path(f"{where}.lock").unlink(
            missing_ok=True
        )  # of a run that was killed: ours is the only one
        _drop_broken_end(where)
    try:
        return JournalStorage(JournalFileBackend(where, lock_obj=JournalFileOpenLock(where)))
    except (ValueError, KeyError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{where}: found something that is no journal ({error})") from error


def _drop_broken_end(where: str) -> None:
    """A line that a kill left unfinished would spoil the next one."""
    import logging

    file = Path(where)
    if not file.is_file():
        return
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    last = whole[whole.rfind(b"\n", 0, -1) + 1 :]
    try:
        json.loads(last or "null")
    except ValueError:
        whole = whole[: len(whole) - len(last)]
    if whole != content:
        logging.getLogger(__name__).warning(
            "%s: dropped %d bytes at its end, which are no whole line",
            where,
            len(content) - len(whole),
        )
        with file.open("r+b") as stream:
            stream.truncate(len(whole))


def _check_same(where: str, known: Any, config: Mapping[str, Any]) -> None:
    if known is None:
        return
    before, now = _flat(known), _flat(config)
    for key, expected in before.items():
        found = now.get(key, "nothing")
        if found != expected:
            raise InputError(
                f"{where}: {key}: found {found} in the config; expected {expected}, as the study has it"
            )
    for key, found in now.items():
        if key not in before:
            raise InputError(
                f"{where}: {key}: found {found} in the config; expected nothing, as the study has it"
            )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        items = [(f"{prefix}.{key}" if prefix else str(key), each) for key, each in value.items()]
    elif isinstance(value, list | tuple):
        items = [(f"{prefix}[{index}]", each) for index, each in enumerate(value)]
    else:
        return {prefix: value}
    return {key: leaf for name, each in items for key, leaf in _flat(each, name).items()}


def _trial(evaluation: Evaluation, genes: Sequence[Gene]) -> optuna.trial.FrozenTrial:
    from optuna.distributions import FloatDistribution
    from optuna.trial import TrialState, create_trial

    attributes: dict[str, Any] = {
        "asked": evaluation.asked,
        "asks": evaluation.asks,
        "genotype": evaluation.genotype.tolist(),
        "violations": list(evaluation.violations),
        "results": evaluation.results,
        "seconds": round(evaluation.seconds, 4),
        "seed": evaluation.seed,
    }
    if evaluation.failure is not None:
        attributes["failure"] = evaluation.failure
    if evaluation.gradient is not None:
        attributes["gradient"] = evaluation.gradient.tolist()
    state = TrialState.FAIL if evaluation.values is None else TrialState.COMPLETE
    if evaluation.stopped is not None:
        attributes["stopped"] = evaluation.stopped
        state = TrialState.PRUNED
    if evaluation.samples is not None:
        attributes["samples"] = write_compact(evaluation.samples)
    trial = create_trial(
        state=state,
        values=evaluation.values,
        params={
            gene.name: float(value) for gene, value in zip(genes, evaluation.genotype, strict=True)
        },
        distributions={gene.name: FloatDistribution(gene.low, gene.high) for gene in genes},
        user_attrs=attributes,
        system_attrs={"constraints": list(evaluation.violations)} if evaluation.violations else {},
    )
    trial.datetime_start = datetime.now() - timedelta(seconds=evaluation.seconds)
    return trial


def _evaluation(trial: optuna.trial.FrozenTrial) -> Evaluation:
    attributes = trial.user_attrs
    gradient, samples = attributes.get("gradient"), attributes.get("samples")
    return Evaluation(
        np.array(attributes["genotype"], dtype=np.float64),
        attributes["asked"],
        attributes["asks"],
        None if trial.values is None else tuple(trial.values),
        tuple(attributes["violations"]),
        attributes["results"],
        attributes["seconds"],
        attributes["seed"],
        attributes.get("failure"),
        None if gradient is None else np.array(gradient, dtype=np.float64),
        attributes.get("stopped"),
        None if samples is None else read_compact(samples),
    )
