"""From a config without weights to weights, losses first."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from mergekit.options import MergeOptions

from mergekit_align.cocktail.losses import (
    Models,
    Precision,
    SampleLoss,
    encode,
    sample_losses,
    with_lora_cache,
)
from mergekit_align.cocktail.settings import CocktailConfig, draw_samples
from mergekit_align.cocktail.tokenizers import Unit, load_tokenizers
from mergekit_align.errors import InputError
from mergekit_align.samples import Sample, SampleType

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Ingredient(NamedTuple):
    """One model of a cocktail."""

    model: str
    losses: dict[SampleType, float]
    """Mean loss on the samples of each type, nats a `Cocktail.unit`."""
    loss: float
    """Their weighted sum."""
    weight: float
    """In the merge; the mean over layers where they differ."""


class Solution(NamedTuple):
    """What the merged model makes of the samples, by either rule; nats a token."""

    softmax: dict[SampleType, float]
    """Mean loss on the samples of each type with the softmax's weights."""
    solved: dict[SampleType, float]
    """The same with the weights that minimise the sum."""
    softmax_loss: float
    """Weighted sum of `softmax`."""
    solved_loss: float
    """Weighted sum of `solved`."""

    def rows(self) -> list[tuple[str, dict[SampleType, float], float]]:
        """Each rule's name, losses by type, and their weighted sum."""
        return [
            ("softmax weights", self.softmax, self.softmax_loss),
            ("solved weights", self.solved, self.solved_loss),
        ]


class Cocktail(NamedTuple):
    """Models with their weights, and the plain mergekit config that has them."""

    ingredients: list[Ingredient]
    unit: Unit
    """What the losses are a mean over."""
    samples: dict[SampleType, int]
    """How many samples of each type were read."""
    precision: Precision
    solution: Solution | None
    """Of `solve`."""
    config: dict[str, Any]


def mix(
    config: CocktailConfig,
    options: MergeOptions | None = None,
    *,
    cache: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Cocktail | None:
    """The cocktail of a config.

    A model's loss is the weighted sum over sample types of its mean loss on samples of that type; the
    weights are softmax(-loss / temperature) (arXiv 2311.13534, section 3), or with `solve` those
    that minimise the merged model's. Under `accelerate launch` every process calls it.

    Args:
        options: mergekit's, where they say how models are found and loaded.
        cache: directory of losses that were computed before; `None` for the user's cache.
        progress: told in a line of every model, and of every step of `solve`.

    Returns:
        `None` in all processes but the first.

    Raises:
        InputError: the models or the samples cannot be used; before a weight is read. Or a loss is no
            number, or no merge keeps the floors.
    """
    from accelerate import PartialState

    options = with_lora_cache(options or MergeOptions(), config.merge)
    section = config.section
    samples = draw_samples(config, progress)
    tokenizers, unit = load_tokenizers(config, options)
    if section.solve and unit == "byte":
        raise InputError.at(
            config.path, "align.solve", found="true", expected="models of one vocabulary with it"
        )
    models = Models(Precision.of(section.device, section.dtype), options)
    every = [sample for chosen in samples.values() for sample in chosen]
    losses = sample_losses(
        config.models,
        tokenizers,
        every,
        models,
        max_batch_size=section.batch_size,
        cache=cache,
        progress=progress,
    )
    if not PartialState().is_main_process:
        return None
    by_type = [_means(own, samples, unit) for own in losses]
    for model, means in zip(config.models, by_type, strict=True):
        for kind, mean in means.items():
            if not math.isfinite(mean):
                raise InputError(f"{model}: found a loss of {mean} on {kind} samples")
    totals = [_weighted(means, section.weights) for means in by_type]
    weights = softmax([-total / section.temperature for total in totals])
    settings: list[Any] = weights
    solution = None
    if section.solve:
        weights, settings, solution = _solved(
            config, weights, samples, tokenizers[0], models, progress
        )
    names = [str(model) for model in config.models]
    return Cocktail(
        [Ingredient(*each) for each in zip(names, by_type, totals, weights, strict=True)],
        unit,
        {kind: len(chosen) for kind, chosen in samples.items()},
        models.precision,
        solution,
        config.with_weights(dict(zip(config.models, settings, strict=True))),
    )


def softmax(values: Sequence[float]) -> list[float]:
    """Shares that sum to 1."""
    highest = max(values)
    shares = [math.exp(value - highest) for value in values]
    return [share / sum(shares) for share in shares]


def _weighted(means: Mapping[SampleType, float], weights: Mapping[SampleType, float]) -> float:
    return sum(weights.get(kind, 0.0) * mean for kind, mean in means.items())


def _means(
    losses: Sequence[SampleLoss], samples: Mapping[SampleType, Sequence[Sample]], unit: Unit
) -> dict[SampleType, float]:
    """Mean over the samples of a type of the loss a token, or a byte of the response."""
    means: dict[SampleType, float] = {}
    rest = list(losses)
    for kind, chosen in samples.items():
        own, rest = rest[: len(chosen)], rest[len(chosen) :]
        sizes = [
            loss.tokens if unit == "token" else max(1, len(sample.response.encode()))
            for loss, sample in zip(own, chosen, strict=True)
        ]
        means[kind] = sum(loss.nll / size for loss, size in zip(own, sizes, strict=True)) / len(own)
    return means


def _solved(
    config: CocktailConfig,
    start: Sequence[float],
    samples: Mapping[SampleType, Sequence[Sample]],
    tokenizer: PreTrainedTokenizerBase,
    models: Models,
    progress: Callable[[str], None],
) -> tuple[list[float], list[Any], Solution]:
    """Weights that minimise the merged model's loss: their means, mergekit's settings, the losses."""
    from mergekit_align.cocktail.solve import Problem, solve

    section = config.section
    first = config.models[0]
    encoded = {kind: encode(chosen, tokenizer, first, models) for kind, chosen in samples.items()}
    problem = Problem(
        models.load(first),
        [models.tensors(model) for model in config.models],
        encoded,
        section.granularity,
    )
    before, after = solve(
        problem,
        np.array(start),
        section.weights,
        floors=section.floors,
        max_steps=section.max_steps,
        progress=progress,
    )
    settings = [_setting(column, problem.filters()) for column in after.weights.T]
    solution = Solution(
        before.losses,
        after.losses,
        _weighted(before.losses, section.weights),
        _weighted(after.losses, section.weights),
    )
    return [float(column.mean()) for column in after.weights.T], settings, solution


def _setting(weights: Sequence[float], filters: Sequence[Sequence[str]]) -> Any:
    """A `weight` as mergekit reads it: a number, or numbers by what tensors' names hold."""
    if len(weights) == 1:
        return float(weights[0])
    return [
        {"filter": name, "value": float(weight)} if name else {"value": float(weight)}
        for weight, names in zip(weights, filters, strict=True)
        for name in (names or [""])
    ]
