"""What response tasks' metrics are on every sample, read straight from the model, all tasks in one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mergekit_align.evolve.genes import Array
from mergekit_align.loss import ResponseReader
from mergekit_align.tasks.response import ResponseTask, encode_requests

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Metric = tuple[str, str]
"""Task and metric, `METRIC,FILTER` as lm-eval names it."""
SampleValues = dict[Metric, Array]
"""Of each metric its value on every sample of the task, [samples]; NaN where it was not read yet."""
Slice = Mapping[str, Sequence[int]]
"""By task, places of the samples that are read together."""


class _Needs(NamedTuple):
    """What a response task's metrics are made of."""

    responses: bool
    decisions: bool


class _Part(NamedTuple):
    """Tasks of the same needs, in one slice."""

    places: list[tuple[str, Sequence[int]]]
    reader: ResponseReader


class SampleReader:
    """Reads samples of response tasks whose requests are built.

    Args:
        lm: lm-eval's wrapper of the model.
        wanted: what is read; a task's other metrics are not computed.
        slices: what can be read by itself; every sample is in one of them.
    """

    def __init__(
        self,
        tasks: Mapping[str, ResponseTask],
        lm: Any,
        wanted: Collection[Metric],
        slices: Sequence[Slice],
        *,
        batch_size: int | None = None,
    ) -> None:
        self._tasks = tasks
        self._wanted = wanted
        self.slices = slices
        self._parts: list[list[_Part]] = [[] for _ in slices]
        for needs in (_Needs(True, False), _Needs(False, True), _Needs(True, True)):
            names = [name for name in tasks if self._needs(name) == needs]
            if not names:
                continue
            requests = [each for name in names for each in tasks[name].instances]
            encoded, openings = encode_requests(lm, requests)
            starts = dict(zip(names, self._starts(names), strict=True))
            for number, chosen in enumerate(slices):
                places = [(name, chosen[name]) for name in names]
                rows = [starts[name] + place for name, own in places for place in own]
                model: PreTrainedModel = lm.model
                reader = ResponseReader(
                    model,
                    [encoded[row] for row in rows],
                    openings=[openings[row] for row in rows] if needs.decisions else None,
                    max_batch_size=batch_size,
                    responses=needs.responses,
                )
                self._parts[number].append(_Part(places, reader))

    def read(self, number: int, into: SampleValues) -> None:
        """Add what the model as it is now makes of a slice."""
        for places, reader in self._parts[number]:
            scores = iter(reader.scores())
            for name, own in places:
                task = self._tasks[name]
                for place in own:
                    found = task.process_results(task.instances[place].doc, [next(scores)])
                    for metric, value in found.items():
                        key = name, f"{metric},none"
                        if key in self._wanted:
                            if key not in into:
                                into[key] = np.full(len(task.instances), np.nan)
                            into[key][place] = value

    def means(self, values: SampleValues) -> dict[str, dict[str, float]]:
        """The tasks' metrics, of samples that are read, all of them."""
        means: dict[str, dict[str, float]] = {name: {} for name in self._tasks}
        for (name, metric), each in values.items():
            aggregate = self._tasks[name].aggregation()[metric.removesuffix(",none")]
            means[name][metric] = float(aggregate(each.tolist()))
        return means

    def _needs(self, name: str) -> _Needs:
        metrics = {metric for task, metric in self._wanted if task == name}
        decisions = {metric for metric in metrics if metric.startswith("decision_")}
        return _Needs(responses=metrics != decisions, decisions=bool(decisions))

    def _starts(self, names: Sequence[str]) -> list[int]:
        sizes = [len(self._tasks[name].instances) for name in names]
        return [sum(sizes[:index]) for index in range(len(sizes))]
