"""What response tasks' metrics are on every sample, read straight from the model, all tasks in one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mergekit_align.encoding import EncodedSample
from mergekit_align.evolve.genes import Array
from mergekit_align.loss import ResponseReader
from mergekit_align.openings import Openings
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


class _Group(NamedTuple):
    """Tasks of the same needs, encoded."""

    needs: _Needs
    starts: Mapping[str, int]
    """Where each task's samples begin."""
    encoded: list[EncodedSample]
    openings: list[Openings | None]


class SliceReader(NamedTuple):
    """Reads some samples of every task, as often as it is asked to."""

    tasks: Mapping[str, ResponseTask]
    wanted: Collection[Metric]
    parts: list[tuple[list[tuple[str, Sequence[int]]], ResponseReader]]
    """Tasks with their places, and what reads these."""

    def read(self, into: SampleValues) -> None:
        """Add what the model as it is now makes of them."""
        for places, reader in self.parts:
            scores = iter(reader.scores())
            for name, own in places:
                task = self.tasks[name]
                for place in own:
                    found = task.process_results(task.instances[place].doc, [next(scores)])
                    for metric, value in found.items():
                        key = name, f"{metric},none"
                        if key in self.wanted:
                            if key not in into:
                                into[key] = np.full(len(task.instances), np.nan)
                            into[key][place] = value


class SampleReader:
    """Reads samples of response tasks whose requests are built.

    Args:
        lm: lm-eval's wrapper of the model.
        wanted: what is read; a task's other metrics are not computed.
    """

    def __init__(
        self,
        tasks: Mapping[str, ResponseTask],
        lm: Any,
        wanted: Collection[Metric],
        *,
        batch_size: int | None = None,
    ) -> None:
        self._tasks = tasks
        self._model: PreTrainedModel = lm.model
        self._wanted = wanted
        self._batch_size = batch_size
        self._groups: list[_Group] = []
        for needs in (_Needs(True, False), _Needs(False, True), _Needs(True, True)):
            names = [name for name in tasks if self._needs(name) == needs]
            requests = [each for name in names for each in tasks[name].instances]
            if requests:
                sizes = [0, *(len(tasks[name].instances) for name in names)]
                starts = dict(zip(names, accumulate(sizes), strict=False))
                self._groups.append(_Group(needs, starts, *encode_requests(lm, requests)))
        self.whole = self.slice({name: range(len(task.instances)) for name, task in tasks.items()})
        """Every sample, in its order."""

    def encoded(self, name: str) -> tuple[list[EncodedSample], list[Any]]:
        """A task's samples, and the openings that each one's decision compares."""
        group = next(each for each in self._groups if name in each.starts)
        start = group.starts[name]
        own = slice(start, start + len(self._tasks[name].instances))
        return group.encoded[own], group.openings[own]

    def tokens(self) -> dict[str, float]:
        """By task, how many are read of a sample: the mean."""
        found = {}
        for name in self._tasks:
            own, _ = self.encoded(name)
            responses = self._needs(name).responses
            read = sum(len(p) + (len(r) if responses else 0) for p, r in own)
            found[name] = read / len(own)
        return found

    def slice(self, places: Slice) -> SliceReader:
        """A reader of some samples."""
        parts = []
        for needs, starts, encoded, openings in self._groups:
            own = [(name, places[name]) for name in starts if places.get(name)]
            rows = [starts[name] + place for name, each in own for place in each]
            reader = ResponseReader(
                self._model,
                [encoded[row] for row in rows],
                openings=[openings[row] for row in rows] if needs.decisions else None,
                max_batch_size=self._batch_size,
                responses=needs.responses,
            )
            parts.append((own, reader))
        return SliceReader(self._tasks, self._wanted, parts)

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
