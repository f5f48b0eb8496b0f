"""The search itself: ask, evaluate, remember, tell; until the budget is spent."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from mergekit_align.errors import InputError
from mergekit_align.evolve.candidate import Evaluator, Result
from mergekit_align.evolve.config import EvolveConfig
from mergekit_align.evolve.genes import Genotype
from mergekit_align.evolve.pools import InProcess, Pool, RayPool
from mergekit_align.evolve.racing import Field
from mergekit_align.evolve.ranking import best_of, dominates, fitness_of
from mergekit_align.evolve.searchers import Outcome, Searcher, Space, make_searcher
from mergekit_align.evolve.study import Evaluation, Study, open_study
from mergekit_align.files import write_text

ALIKE_FAILURES = 3
"""Candidates in a row that fail with the same words: the set-up is at fault, not the candidate."""


class SearchError(RuntimeError):
    """The search cannot go on: candidates fail one after another, all in the same way."""


class Search(NamedTuple):
    """What a search has found."""

    config: EvolveConfig
    evaluations: list[Evaluation]
    new: int
    """Evaluations of this run; the others are of earlier ones."""
    stopped: bool
    """Whether it was interrupted."""

    @property
    def best(self) -> Evaluation | None:
        """The best feasible evaluation, or the one that misses least; `None` if all failed."""
        return best_of(self.config, self.evaluations)

    @property
    def front(self) -> list[Evaluation]:
        """Feasible evaluations that no other is better than in every objective."""
        feasible = [each for each in self.evaluations if each.complete and not each.violation]
        return [each for each in feasible if not any(dominates(o, each) for o in feasible)]


Progress = Callable[[str], None]


def search(
    config: EvolveConfig,
    *,
    resume: bool = False,
    progress: Progress = lambda line: None,
    evaluator: Callable[[], Evaluator] | None = None,
    workers: int = 1,
    ray_address: str | None = None,
) -> Search:
    """Search for the best merge of a config.

    Every evaluation is remembered in `config.study` before the next one begins, and
    `best_config.yml` in `config.storage` is kept current. An interrupt (Ctrl-C) lets the candidate
    that is being evaluated finish; a second one does not.

    Args:
        resume: go on with a study where it was left.
        progress: told of every evaluation in a line.
        evaluator: makes that of this config, when it is needed.
        workers: candidates that are evaluated at the same time, on Ray where more than one.
        ray_address: of a running Ray cluster.

    Raises:
        InputError: the config or its study cannot be used.
        SearchError: candidates fail one after another.
    """
    from mergekit_align.evolve.memory import check_memory

    check_memory(config)
    space = Space(
        config.genes.every,
        objectives=len(config.objectives) or 1,
        constraints=len(config.floors),
        random_start=config.file.config.random_init,
    )
    opened = open_study(
        config.study,
        config.genes.every,
        config.identity(),
        objectives=space.objectives,
        resume=resume,
        lock=config.storage / "running.lock",
    )
    with opened as study, _interrupts() as interrupted:
        searcher = make_searcher(config.searcher, space, config.file.section)
        asking = replay(searcher, study.evaluations, config.study)
        before = len(study.evaluations)
        started = time.monotonic()

        def ends() -> bool:
            late = config.seconds is not None and time.monotonic() - started > config.seconds
            return late or interrupted()

        if before < config.evaluations:
            gradient = config.by_gradient
            pool: Pool
            if workers > 1 or ray_address is not None:
                pool = RayPool(config, workers, address=ray_address, gradient=gradient)
            else:
                pool = InProcess(evaluator or cache(lambda: Evaluator(config)), gradient=gradient)
            running: set[int] = set()
            field = Field(config, searcher.generation)
            for each in study.evaluations:
                field.add(each)
            while True:
                left = config.evaluations - len(study.evaluations) - len(running)
                while left > 0 and len(running) < pool.size and not ends():
                    number = asking.next(running)
                    if number is None:
                        break
                    pool.submit(number, asking.pending[number], field.standing)
                    running.add(number)
                    left -= 1
                if not running:
                    break
                number, result = pool.wait()
                running.remove(number)
                study.add(asking.answer(number, result, config.seed))
                field.add(study.evaluations[-1])
                _keep_best(config, study)
                progress(_line(config, study, before, time.monotonic() - started))
                _check_failures(study.evaluations)
        return Search(config, study.evaluations, len(study.evaluations) - before, interrupted())


class Asking:
    """A searcher's asks by number, so that they can be answered in any order and again."""

    def __init__(self, searcher: Searcher) -> None:
        self._searcher = searcher
        self.asks = 0
        self.pending: dict[int, Genotype] = {}

    def next(self, running: Collection[int]) -> int | None:
        """The number of a candidate that is not `running`: one asked for before, or a new one."""
        waiting = [number for number in self.pending if number not in running]
        if waiting:
            return waiting[0]
        return self.asks - 1 if self.ask() is not None else None

    def ask(self) -> Genotype | None:
        genotype = self._searcher.ask()
        if genotype is not None:
            self.pending[self.asks] = genotype
            self.asks += 1
        return genotype

    def answer(self, number: int, result: Result, seed: int) -> Evaluation:
        """Tell what became of a pending candidate."""
        evaluation = Evaluation(
            self.pending[number],
            number,
            self.asks,
            result.values,
            result.violations,
            result.results,
            result.seconds,
            seed,
            result.failure,
            result.gradient,
            result.stopped,
            result.samples,
        )
        self.tell(evaluation)
        return evaluation

    def tell(self, evaluation: Evaluation) -> None:
        self._searcher.tell(
            self.pending.pop(evaluation.asked),
            Outcome(evaluation.values, evaluation.violations, evaluation.gradient),
        )


def replay(searcher: Searcher, evaluations: list[Evaluation], where: str) -> Asking:
    """A fresh searcher, brought to where it was after `evaluations`.

    Raises:
        InputError: it asks for other candidates than it did.
    """
    asking = Asking(searcher)
    for number, evaluation in enumerate(evaluations):
        while asking.asks < evaluation.asks and asking.ask() is not None:
            pass
        asked = asking.pending.get(evaluation.asked)
        if asked is None or not np.array_equal(asked, evaluation.genotype):
            raise InputError(
                f"{where}: evaluation {number}: found a candidate that this version of the searcher "
                "would not ask for; expected a study of this version"
            )
        asking.tell(evaluation)
    return asking


def _keep_best(config: EvolveConfig, study: Study) -> None:
    best = best_of(config, study.evaluations)
    if best is study.evaluations[-1]:
        write_text(
            config.storage / "best_config.yml", config.genes.config(best.genotype).to_yaml() + "\n"
        )


def _line(config: EvolveConfig, study: Study, before: int, seconds: float) -> str:
    done = len(study.evaluations)
    each = seconds / (done - before)
    left = (config.evaluations - done) * each
    if config.seconds is not None:
        left = min(left, max(0.0, config.seconds - seconds))
    best = best_of(config, study.evaluations)
    parts = [f"{done}/{config.evaluations}"]
    if best is not None:
        parts.append(f"best {fitness_of(config, best):.4f}")
    if config.floors:
        feasible = sum(e.values is not None and not e.violation for e in study.evaluations)
        parts.append(f"feasible {feasible / done:.0%}")
    stopped = sum(e.stopped is not None for e in study.evaluations)
    if stopped:
        parts.append(f"stopped early {stopped / done:.0%}")
    failed = sum(e.values is None for e in study.evaluations)
    if failed:
        parts.append(f"failed {failed}")
    parts += [f"{each:.2f} s each", f"{_duration(left)} left"]
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _check_failures(evaluations: list[Evaluation]) -> None:
    last = [each.failure for each in evaluations[-ALIKE_FAILURES:]]
    if len(last) == ALIKE_FAILURES and last[0] is not None and len(set(last)) == 1:
        raise SearchError(f"{ALIKE_FAILURES} candidates in a row failed alike: {last[0]}")


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether there was an interrupt; the first one interrupts nothing."""
    import threading

    seen = False

    def handle(number: int, frame: Any) -> None:
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, previous)
