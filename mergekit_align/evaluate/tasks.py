"""lm-eval tasks as columns: any task, group or tag, by its main metric.

A task's main metric is `acc` or `exact_match` where it has one, else the first that it lists; a
group's is the first that it aggregates. `NAME:METRIC` asks for another. Where lm-eval's number is the
mean of its samples' metrics, as it is for nearly all tasks, the samples are the column's outcomes; a
group that weighs its tasks otherwise keeps lm-eval's own number and standard error.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any, NamedTuple

import numpy as np

from mergekit_align.checks import find_tasks
from mergekit_align.errors import InputError, closest, one_line
from mergekit_align.evaluate.scores import Reported

_PREFERRED = ("acc", "exact_match")
_FEWSHOT_SEED = 1234  # lm-eval's own, so that its command gives the same number
_BOOTSTRAP_ITERATIONS = 1000  # for standard errors that have no formula


class ChosenTask(NamedTuple):
    """A task, group or tag, and the metric that is its column."""

    name: str
    metric: str
    filter: str
    loaded: Any
    """What lm-eval's `TaskManager` loads."""


class TaskResult(NamedTuple):
    """What a model made of a task."""

    outcomes: list[float | None]
    """Of each sample; empty where the metric is no number a sample."""
    reported: Reported


def choose_tasks(
    names: Sequence[str], search_path: Sequence[str], metadata: dict[str, Any]
) -> list[ChosenTask]:
    """The tasks of these names, each `NAME` or `NAME:METRIC`, with their datasets.

    Raises:
        InputError: a name is unknown or comes twice, a task has no such metric, its dataset cannot
            be loaded, or it needs what this command does not give.
    """
    plain = [name.partition(":")[0] for name in names]
    for name in plain:
        if plain.count(name) > 1:
            raise InputError(f"--tasks: found {name!r} twice; expected every task once")
    where = {f"--tasks {name}": name for name in plain}
    try:
        loaded = find_tasks(where, search_path, metadata=metadata)
    except InputError:
        raise
    except (OSError, ImportError, ValueError) as error:
        reason = one_line(error)
        raise InputError(f"--tasks: found one that does not load ({reason})") from error
    return [
        _with_metric(name, name.partition(":")[2], found)
        for name, found in zip(names, loaded.values(), strict=True)
    ]


def _with_metric(name: str, wanted: str, loaded: Any) -> ChosenTask:
    name = name.partition(":")[0]
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise InputError(
                f"--tasks {name}: found a task that runs the models' code or shows pictures; "
                "expected one of text alone"
            )
    leaf = next(iter(loaded["tasks"].values()))
    group = loaded["groups"].get(name)
    aggregated = [each.metric for each in (group.aggregate_metric_list or [])] if group else []
    metrics = aggregated or list(leaf.aggregation())
    if wanted and wanted not in metrics:
        raise InputError(
            f"--tasks {name}: found metric {wanted!r}; expected one of {', '.join(metrics)}"
            f"{closest(wanted, metrics)}"
        )
    preferred = [] if aggregated else [metric for metric in _PREFERRED if metric in metrics]
    return ChosenTask(name, wanted or [*preferred, *metrics][0], leaf._filters[0].name, loaded)


def run_task(
    lm: Any, task: ChosenTask, *, limit: int | None, apply_chat_template: bool
) -> TaskResult:
    """What the model makes of a task, few-shot examples as turns where it is chatted with."""
    from lm_eval import evaluator

    for leaf in task.loaded["tasks"].values():
        leaf.set_fewshot_seed(seed=_FEWSHOT_SEED)
    with redirect_stdout(sys.stderr):  # where lm-eval prints what it is doing
        results = evaluator.evaluate(
            lm,
            task.loaded,
            limit=limit,
            bootstrap_iters=_BOOTSTRAP_ITERATIONS,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
        )
    outcomes = [
        sample.get(task.metric)
        for leaf in task.loaded["tasks"]
        for sample in results["samples"][leaf]
        if sample["filter"] == task.filter
    ]
    numbers: list[float | None] = [
        float(value) for value in outcomes if isinstance(value, bool | int | float | np.generic)
    ]
    if len(numbers) < len(outcomes):
        numbers = []
    own = results["results"].get(task.name, {})
    mean = math.fsum(value or 0.0 for value in numbers) / len(numbers) if numbers else math.nan
    value = own.get(f"{task.metric},{task.filter}", mean)
    stderr = own.get(f"{task.metric}_stderr,{task.filter}")
    return TaskResult(
        numbers, Reported(float(value), stderr if isinstance(stderr, float) else math.nan)
    )
