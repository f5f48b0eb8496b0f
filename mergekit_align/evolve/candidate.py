"""A candidate: a genotype is merged into the one model, and scored."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np
from mergekit.config import MergeConfiguration

from mergekit_align.errors import InputError, one_line
from mergekit_align.evolve.ascent import Ascent
from mergekit_align.evolve.compact import compact
from mergekit_align.evolve.config import EvolveConfig
from mergekit_align.evolve.distillation import DISTILLATION, teach
from mergekit_align.evolve.fitness import Fitness, Results, Scored
from mergekit_align.evolve.genes import Array, Genotype
from mergekit_align.evolve.merging import MergedModel
from mergekit_align.evolve.racing import Race, Standing, racing_metrics
from mergekit_align.evolve.sample_values import Metric, SampleValues, SliceReader


class Result(NamedTuple):
    """What an evaluation gave."""

    values: tuple[float, ...] | None
    """Objectives, to be maximised; `None` where it failed."""
    violations: tuple[float, ...]
    """How far each floor is missed; feasible means <= 0."""
    results: Results
    seconds: float
    failure: str | None = None
    gradient: Array | None = None
    stopped: int | None = None
    """Samples after which it lost its race; its values are estimates then."""
    samples: SampleValues | None = None
    """What it made of every sample, where candidates race."""


class _Course(NamedTuple):
    """A race as it is run."""

    standing: Standing
    race: Race
    slices: Sequence[Callable[[], SliceReader]]
    """Made when the first candidate comes as far."""


class Evaluator:
    """Evaluates the candidates of a search, one after another, in one model.

    Raises:
        InputError: the models cannot be merged in memory.
    """

    def __init__(self, config: EvolveConfig) -> None:
        self._config = config
        self.merged = MergedModel(
            config.genes.config(config.genes.start),
            config.merge_options(),
            device=config.device,
            dtype=config.dtype,
        )
        self.fitness = Fitness(
            config.file.config,
            config.file.loaded,
            self.merged.model,
            self.merged.tokenizer,
            batch_size=config.file.section.batch_size,
            metrics=[
                *((floor.task, floor.metric) for floor in config.floors),
                *config.objectives,
                *(racing_metrics(config) if config.racing else []),
            ],
        )
        if config.distillation is not None:
            self.fitness.lessons = teach(config, self.fitness)
        self._ascent: Ascent | None = None
        self._course: _Course | None = None

    def evaluate(
        self, genotype: Genotype, *, gradient: bool = False, standing: Standing | None = None
    ) -> Result:
        """Whatever a candidate fails with is its result; what the user can repair is raised.

        Args:
            gradient: find the gradients of the fitness and of the violations too.
            standing: what it races; by default it sees every sample.

        Raises:
            InputError: the config cannot be used.
        """
        started = time.monotonic()
        slopes: Array | None = None
        stopped: int | None = None
        samples: SampleValues | None = None
        try:
            if gradient:
                scored, slopes = self._climb(genotype)
            elif self._config.racing:
                scored, stopped, samples = self._run(genotype, standing)
            else:
                scored = self.score(self._config.genes.config(genotype))
            values = self._objectives(scored)
            if not all(math.isfinite(value) for value in values):
                raise ArithmeticError(f"its score is {', '.join(map(str, values))}")
        except InputError:
            raise
        except Exception as error:  # whatever it is, it must not end the search
            failure = f"{type(error).__name__}: {one_line(error, 500)}"
            return Result(None, (), {}, time.monotonic() - started, failure)
        violations = tuple(
            floor.least - scored.results[floor.task][floor.metric] for floor in self._config.floors
        )
        seconds = time.monotonic() - started
        return Result(values, violations, scored.results, seconds, None, slopes, stopped, samples)

    def score(self, config: MergeConfiguration) -> Scored:
        """What the model merged by any mergekit config is worth."""
        self.merged.merge(config)
        return self.fitness.score()

    def _run(
        self, genotype: Genotype, standing: Standing | None
    ) -> tuple[Scored, int | None, SampleValues | None]:
        """What a candidate is worth, and after how many samples it lost, or what it made of all."""
        self.merged.merge(self._config.genes.config(genotype))
        samples = self.fitness.samples
        values: SampleValues = {}
        if standing is None:
            samples.whole.read(values)
        else:
            self._course = self._course_of(standing)
            _, race, slices = self._course
            for stage, reader in enumerate(slices):
                reader().read(values)
                if stage < len(slices) - 1 and race.is_lost(values, stage):
                    scored = self.fitness.total(race.estimate(values, stage))
                    return scored, race.samples(stage), None
        return self.fitness.total(samples.means(values)), None, compact(values)

    def _course_of(self, standing: Standing) -> _Course:
        before = self._course
        if before is not None and _see_the_same(before.standing, standing):
            return before._replace(standing=standing, race=before.race.against(standing.rival))
        samples = self.fitness.samples
        race = Race(self._config, standing, samples.tokens())
        readers = [cache(partial(samples.slice, each)) for each in race.slices]
        return _Course(standing, race, readers)

    def _climb(self, genotype: Genotype) -> tuple[Scored, Array]:
        """What a candidate is worth, and the gradients of that and of its violations."""
        config = self._config
        merges = self.merged.merge(config.genes.config(genotype))
        if self._ascent is None:
            self._ascent = Ascent(config.genes, self.merged, self.fitness)
        tasks = config.file.config.tasks
        wanted = [(task.name, task.metric) for task in tasks]
        wanted += [(floor.task, floor.metric) for floor in config.floors]
        taught = [(task, DISTILLATION) for task in self.fitness.lessons]
        slope = self._ascent.at(merges, [*wanted, *taught])
        scored = self.fitness.total(slope.results)
        fitness = sum(task.weight * slope.gradients[task.name, task.metric] for task in tasks)
        if config.distillation is not None:
            weight = config.distillation.weight
            fitness += weight * sum(slope.gradients[each] for each in taught)
            nearness = sum(slope.results[task][metric] for task, metric in taught)
            scored = scored._replace(score=scored.score + weight * nearness)
        missed = [-slope.gradients[floor.task, floor.metric] for floor in config.floors]
        return scored, np.array([fitness, *missed])

    def _objectives(self, scored: Scored) -> tuple[float, ...]:
        if not self._config.objectives:
            return (scored.score,)
        return tuple(scored.results[task][metric] for task, metric in self._config.objectives)


def _see_the_same(one: Standing, other: Standing) -> bool:
    """Whether candidates see the same samples in the same order.

    With several processes two standings that are equal are never the same object.
    """
    return one.generation == other.generation and (
        one.spread is other.spread or _equal(one.spread, other.spread)
    )


def _equal(one: Mapping[Metric, Array], other: Mapping[Metric, Array]) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(one[each], other[each]) for each in one
    )
