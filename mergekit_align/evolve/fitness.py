"""The fitness of the one model that every candidate is, as the stock search defines it.

Tasks are loaded, their requests built and their samples encoded once. Response tasks are read straight
from the model; any other task goes through lm-eval, with the seeds that it would have.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from mergekit_align.evolve.distillation import DISTILLATION
from mergekit_align.evolve.sample_values import SampleReader, SampleValues
from mergekit_align.gradient import (
    Lesson,
    MeanOverSamples,
    mean_decision,
    mean_logprob,
    mean_nearness,
)
from mergekit_align.tasks.response import ResponseTask, is_response_task

if TYPE_CHECKING:
    from mergekit.evo.config import EvolMergeConfiguration
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# lm-eval's own, so that its command gives the same number
_SEED, _OTHER_SEED = 0, 1234

Results = dict[str, dict[str, float]]
"""By task's name, each of its metrics, `METRIC,FILTER` as lm-eval names them."""


class Scored(NamedTuple):
    """What a candidate is worth."""

    score: float
    """The weighted sum of the config's metrics."""
    results: Results


class Fitness:
    """The fitness of `model`, whatever its parameters are when it is asked for.

    Args:
        loaded: what lm-eval loads for each task's name; used up.
        batch_size: requests that the model answers at once; by default by length.
        metrics: task and metric of more numbers that are wanted; a response task's others are not
            computed.
    """

    def __init__(
        self,
        config: EvolMergeConfiguration,
        loaded: Mapping[str, Any],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int | None = None,
        metrics: Iterable[tuple[str, str]] = (),
    ) -> None:
        self._config = config
        wanted = {*metrics, *((task.name, task.metric) for task in config.tasks)}
        self._lm = _wrapped(model, tokenizer, batch_size)
        self._responses: dict[str, ResponseTask] = {}
        self._others: dict[str, Any] = {}
        for name, each in loaded.items():
            for task in each["tasks"].values():
                if config.shuffle and not getattr(task, "every_sample", None):
                    task.dataset = task.dataset.shuffle(seed=_OTHER_SEED)
                _set_few_shot(task, config.num_fewshot)
                _build_requests_once(task)
            if is_response_task(each):
                self._responses[name] = next(iter(each["tasks"].values()))
            else:
                self._others[name] = each
        for task in self._responses.values():
            self._build(task)
        self.lessons: dict[str, list[Lesson]] = {}
        """What the teachers of tasks predict."""
        self._means: dict[tuple[str, str], MeanOverSamples] = {}
        self.samples = SampleReader(self._responses, self._lm, wanted, batch_size=batch_size)

    def score(self) -> Scored:
        """The fitness of the model as it is now."""
        values: SampleValues = {}
        self.samples.whole.read(values)
        results = self.samples.means(values)
        if self._others:
            _seed_everything()
        for name, loaded in self._others.items():
            results[name] = self._score_other(name, loaded)
        return self.total(results)

    def total(self, results: Results) -> Scored:
        """The fitness that follows from the tasks' metrics."""
        score = sum(results[task.name][task.metric] * task.weight for task in self._config.tasks)
        return Scored(float(score), results)

    def accumulate_gradient(self, name: str, metric: str) -> float:
        """A response task's metric; its gradient is added to the parameters' `grad`."""
        if (name, metric) not in self._means:
            self._means[name, metric] = self._mean(name, metric)
        return self._means[name, metric].accumulate()

    def _mean(self, name: str, metric: str) -> MeanOverSamples:
        task = self._responses[name]
        model = self._lm.model
        if metric == DISTILLATION:
            return mean_nearness(model, self.lessons[name])
        encoded, openings = self.samples.encoded(name)
        plain = metric.removesuffix(",none")
        if plain in ("logprob", "sequence_logprob"):
            return mean_logprob(model, encoded, by_token=plain == "logprob")
        (kind,) = set(openings)  # one task has the same for all of its samples
        return mean_decision(
            model,
            encoded,
            kind,
            refusal_wanted=task.sample_type == "alignment",
            margin=plain == "decision_margin",
        )

    def _build(self, task: Any) -> None:
        template = self._config.apply_chat_template
        with redirect_stderr(io.StringIO()):  # its progress bar
            task.build_all_requests(
                limit=self._config.limit,
                apply_chat_template=template,
                fewshot_as_multiturn=self._config.fewshot_as_multiturn,
                chat_template=self._lm.apply_chat_template if template else None,
                tokenizer_name=self._lm.tokenizer_name if template else "",
            )

    def _score_other(self, name: str, loaded: Any) -> dict[str, float]:
        from lm_eval import evaluator

        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # progress bars
            found = evaluator.evaluate(
                self._lm,
                loaded,
                limit=self._config.limit,
                bootstrap_iters=0,
                log_samples=False,
                apply_chat_template=self._config.apply_chat_template,
                fewshot_as_multiturn=self._config.fewshot_as_multiturn,
            )
        return {
            metric: float(value)
            for metric, value in found["results"][name].items()
            if isinstance(value, int | float) and "_stderr" not in metric and "," in metric
        }


def _wrapped(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int | None
) -> Any:
    import logging

    from lm_eval.models.huggingface import HFLM

    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that a model may be wrapped
    try:
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size or 1)
    finally:
        logger.setLevel(level)


def _set_few_shot(task: Any, count: int | None) -> None:
    """As `lm_eval.simple_evaluate` does."""
    own = task.get_config("num_fewshot")
    if count is not None and own != 0:
        task.set_config(key="num_fewshot", value=count)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_OTHER_SEED)


def _build_requests_once(task: Any) -> None:
    original = task.build_all_requests
    built = False

    def build_all_requests(**options: Any) -> None:
        nonlocal built
        if not built:
            original(**options)
            built = True
        for request in task.instances:
            request.resps, request.filtered_resps = [], {}

    task.build_all_requests = build_all_requests


def _seed_everything() -> None:
    """As `lm_eval.simple_evaluate` does."""
    random.seed(_SEED)
    np.random.seed(_OTHER_SEED)
    torch.manual_seed(_OTHER_SEED)
