"""What response tasks' metrics are on every sample, read straight from the model, all tasks in one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mergekit_align.encoding import EncodedSample
from mergekit_align.evolve.genes import Array
from mergekit_align.loss import Question, ResponseReader, ResponseScores, questions
from mergekit_align.tasks.response import ResponseTask, encode_requests

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Metric = tuple[str, str]
"""Task and metric, `METRIC,FILTER` as lm-eval names it."""
SampleValues = dict[Metric, Array]
"""Of each metric its value on every sample of the task, [samples]; NaN where it was not read yet."""
Slice = Mapping[str, Sequence[int]]
"""By task, places of the samples that are read together."""


class SliceReader(NamedTuple):
    """Reads some samples of every task, as often as it is asked to."""

    tasks: Mapping[str, ResponseTask]
    wanted: Collection[Metric]
    places: Slice
    reader: ResponseReader

    def read(self, into: SampleValues) -> None:
        """Add what the model as it is now makes of them."""
        scores = self.reader.scores()
        start = 0
        for name, own in self.places.items():
            task, end = self.tasks[name], start + len(own)
            found = task.metrics(ResponseScores(*(each[start:end] for each in scores)))
            start = end
            for metric, values in found.items():
                key = name, f"{metric},none"
                if key in self.wanted and len(own):
                    if key not in into:
                        into[key] = np.full(len(task.instances), np.nan)
                    into[key][list(own)] = values


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
        self._encoded = {name: encode_requests(lm, task.instances) for name, task in tasks.items()}
        self._questions = {name: self._asked(name) for name in tasks}
        self.whole = self.slice({name: range(len(task.instances)) for name, task in tasks.items()})
        """Every sample, in its order."""

    def encoded(self, name: str) -> tuple[list[EncodedSample], list[Any]]:
        """A task's samples, and the openings that each one's decision compares."""
        return self._encoded[name]

    def tokens(self) -> dict[str, float]:
        """By task, how many are read of a sample: the mean."""
        found = {}
        for name, (encoded, _) in self._encoded.items():
            responses = self._needs(name)[0]
            read = sum(len(p) + (len(r) if responses else 0) for p, r in encoded)
            found[name] = read / len(encoded)
        return found

    def slice(self, places: Slice) -> SliceReader:
        """A reader of some samples."""
        asked = [self._questions[name][place] for name, own in places.items() for place in own]
        reader = ResponseReader(self._model, asked, max_batch_size=self._batch_size)
        return SliceReader(self._tasks, self._wanted, places, reader)

    def means(self, values: SampleValues) -> dict[str, dict[str, float]]:
        """The tasks' metrics, of samples that are read, all of them."""
        means: dict[str, dict[str, float]] = {name: {} for name in self._tasks}
        for (name, metric), each in values.items():
            aggregate = self._tasks[name].aggregation()[metric.removesuffix(",none")]
            means[name][metric] = float(aggregate(each.tolist()))
        return means

    def _asked(self, name: str) -> list[Question]:
        encoded, openings = self._encoded[name]
        responses, decisions = self._needs(name)
        return questions(encoded, openings if decisions else None, responses=responses)

    def _needs(self, name: str) -> tuple[bool, bool]:
        """Whether a task's metrics are made of responses, and of decisions."""
        metrics = {metric for task, metric in self._wanted if task == name}
        decisions = {metric for metric in metrics if metric.startswith("decision_")}
        return metrics != decisions, bool(decisions)
