"""The gradient of a candidate's fitness and floors with respect to its genes.

One forward and one backward pass of the merged model give dF/dW for each metric; a weight's derivative
is its inner product with what the weight scales (see `kernels`), so that weights by layer and by
filter cost no further pass. The rounding of a merge to bfloat16 is taken as the identity, the sign
election of TIES and its selections as fixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mergekit_align.errors import InputError
from mergekit_align.evolve.fitness import Fitness, Results
from mergekit_align.evolve.genes import Array, Genes
from mergekit_align.evolve.kernels import KERNELS
from mergekit_align.evolve.merging import MergedModel
from mergekit_align.evolve.planning import TensorMerge
from mergekit_align.tasks.response import is_response_task

if TYPE_CHECKING:
    from mergekit_align.evolve.config import EvolveConfig

DIFFERENTIABLE = ("logprob", "sequence_logprob", "decision_margin", "decision_logprob")
"""Metrics of response tasks that have a gradient."""


class Slope(NamedTuple):
    """Metrics of a candidate with their gradients."""

    results: Results
    gradients: Mapping[tuple[str, str], Array]
    """By task and metric, [genes]."""


def check_differentiable(config: EvolveConfig) -> None:
    """That a searcher by gradient can search a config.

    Raises:
        InputError: its method or one of its tasks has no gradient; says what to use.
    """
    method = config.file.config.genome.merge_method
    if method not in KERNELS:
        raise InputError.at(
            config.path,
            "align.searcher",
            found=f"{config.searcher!r} with {method}",
            expected=f"it with {', '.join(KERNELS)}, or the searcher cma",
        )
    for index, task in enumerate(config.file.config.tasks):
        _check_metric(config, task.name, task.metric, f"tasks[{index}]")
    for floor in config.floors:
        _check_metric(config, floor.task, floor.metric, f"align.floors.{floor.name}")


def _check_metric(config: EvolveConfig, name: str, metric: str, where: str) -> None:
    if not is_response_task(config.file.loaded[name]):
        raise InputError.at(
            config.path,
            where,
            found=f"{name}, which has no gradient,",
            expected=f"a response task with the searcher {config.searcher}, or the searcher cma",
        )
    plain = metric.removesuffix(",none")
    if plain not in DIFFERENTIABLE:
        close = "decision_logprob" if plain.startswith("decision") else "logprob"
        raise InputError.at(
            config.path,
            where,
            found=f"{name} {plain}, which has no gradient",
            expected=f"{close} with the searcher {config.searcher}, or the searcher cma",
        )


class Ascent:
    """Finds gradients of the one model that every candidate is.

    Args:
        fitness: whose tasks are response tasks, all of them.
    """

    def __init__(self, genes: Genes, merged: MergedModel, fitness: Fitness) -> None:
        self._genes = genes
        self._merged = merged
        self._fitness = fitness
        self._jacobian = self._weights_by_gene()
        merged.model.requires_grad_(True)

    def at(self, merges: Sequence[TensorMerge], wanted: Sequence[tuple[str, str]]) -> Slope:
        """The metrics, by task, of the candidate that the model is now, with their gradients."""
        results: Results = {}
        gradients: dict[tuple[str, str], Array] = {}
        for task, metric in dict.fromkeys(wanted):
            self._merged.model.zero_grad()
            value = self._fitness.accumulate_gradient(task, metric)
            results.setdefault(task, {})[metric] = value
            gradient = np.zeros(len(self._genes))
            for merge in merges:
                parameter = self._merged.parameter(merge.weight.name)
                kernel = self._merged.kernel(merge)
                if parameter is None or parameter.grad is None or kernel is None:
                    continue
                products = kernel.products(parameter.grad, merge.shared, merge.own)
                for model, product in products.items():
                    for gene, share in self._jacobian[merge.weight.name, str(model)].items():
                        gradient[gene] += share * product
            gradients[task, metric] = gradient
        self._merged.model.zero_grad()
        return Slope(results, gradients)

    def _weights_by_gene(self) -> dict[tuple[str, str], dict[int, float]]:
        """By tensor and model, the derivative of its weight by each gene that it depends on.

        A weight is a gene, or lies between those of two groups of layers. A model's genes tell of its
        weights alone, and each tensor has one filter's.
        """
        shape = self._genes.shape
        groups, _, filters, _ = shape
        place = self._genes.parameters.index("weight")
        # The same number in each group of layers: whatever lies between them is that number too.
        filter_of = self._weights(np.arange(1, filters + 1) * np.ones((groups, 1)))
        found: dict[tuple[str, str], dict[int, float]] = {key: {} for key in filter_of}
        for group in range(groups):
            shares = self._weights(np.outer(np.arange(groups) == group, np.ones(filters)))
            for (tensor, model), share in shares.items():
                if share:
                    own = round(filter_of[tensor, model]) - 1
                    gene = (group, self._genes.models.index(model), own, place)
                    found[tensor, model][int(np.ravel_multi_index(gene, shape))] = share
        return found

    def _weights(self, genes: Array) -> dict[tuple[str, str], float]:
        """Weights by tensor and model where every model's genes of weights are [groups, filters]."""
        genotype = np.zeros(self._genes.shape)
        genotype[..., self._genes.parameters.index("weight")] = genes[:, np.newaxis]
        return {
            (merge.weight.name, str(model)): parameters["weight"]
            for merge in self._merged.resolve(self._genes.config(genotype.ravel()))
            for model, parameters in merge.own.items()
            if str(model) in self._genes.models
        }
