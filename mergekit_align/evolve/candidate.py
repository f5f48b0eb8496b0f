"""A candidate: a genotype is merged into the one model, and scored."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import numpy as np
from mergekit.config import MergeConfiguration

from mergekit_align.errors import InputError
from mergekit_align.evolve.ascent import Ascent
from mergekit_align.evolve.config import EvolveConfig
from mergekit_align.evolve.fitness import Fitness, Results, Scored
from mergekit_align.evolve.genes import Array, Genotype
from mergekit_align.evolve.merging import MergedModel
from mergekit_align.evolve.racing import Race
from mergekit_align.evolve.sample_values import Metric, SampleValues


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
            ],
            racing=config.racing,
        )
        self._race: Race | None = None
        if config.racing:
            weights: dict[Metric, float] = {}
            for task in config.file.config.tasks:
                metric = task.name, task.metric
                weights[metric] = weights.get(metric, 0.0) + task.weight
            self._race = Race(weights, config.floors, self.fitness.reader.slices)
        self._ascent: Ascent | None = None

    def evaluate(
        self, genotype: Genotype, *, gradient: bool = False, rival: SampleValues | None = None
    ) -> Result:
        """Whatever a candidate fails with is its result; what the user can repair is raised.

        Args:
            gradient: find the gradients of the fitness and of the violations too.
            rival: what the candidate that it races makes of every sample; by default it sees all.

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
            elif self._race is not None:
                samples = {}
                scored, stopped = self._run_race(self._race, genotype, samples, rival)
            else:
                scored = self.score(self._config.genes.config(genotype))
            values = self._objectives(scored)
            if not all(math.isfinite(value) for value in values):
                raise ArithmeticError(f"its score is {', '.join(map(str, values))}")
        except InputError:
            raise
        except Exception as error:  # whatever it is, it must not end the search
            failure = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            return Result(None, (), {}, time.monotonic() - started, failure)
        violations = tuple(
            floor.least - scored.results[floor.task][floor.metric] for floor in self._config.floors
        )
        seconds = time.monotonic() - started
        if stopped is not None:
            samples = None
        return Result(values, violations, scored.results, seconds, None, slopes, stopped, samples)

    def score(self, config: MergeConfiguration) -> Scored:
        """What the model merged by any mergekit config is worth."""
        self.merged.merge(config)
        return self.fitness.score()

    def _run_race(
        self, race: Race, genotype: Genotype, values: SampleValues, rival: SampleValues | None
    ) -> tuple[Scored, int | None]:
        """What a candidate is worth, and after how many samples it was stopped."""
        self.merged.merge(self._config.genes.config(genotype))
        reader = self.fitness.reader
        last = len(reader.slices) - 1
        for stage in range(last + 1):
            reader.read(stage, values)
            if rival is not None and stage < last and race.is_lost(values, rival, stage):
                return self.fitness.total(race.estimate(values, rival, stage)), race.samples(stage)
        return self.fitness.total(reader.means(values)), None

    def _climb(self, genotype: Genotype) -> tuple[Scored, Array]:
        """What a candidate is worth, and the gradients of that and of its violations."""
        config = self._config
        self.merged.merge(config.genes.config(genotype))
        if self._ascent is None:
            self._ascent = Ascent(config.genes, self.merged, self.fitness)
        tasks = config.file.config.tasks
        wanted = [(task.name, task.metric) for task in tasks]
        wanted += [(floor.task, floor.metric) for floor in config.floors]
        slope = self._ascent.at(genotype, wanted)
        fitness = sum(task.weight * slope.gradients[task.name, task.metric] for task in tasks)
        missed = [-slope.gradients[floor.task, floor.metric] for floor in config.floors]
        return self.fitness.total(slope.results), np.array([fitness, *missed])

    def _objectives(self, scored: Scored) -> tuple[float, ...]:
        if not self._config.objectives:
            return (scored.score,)
        return tuple(scored.results[task][metric] for task, metric in self._config.objectives)
