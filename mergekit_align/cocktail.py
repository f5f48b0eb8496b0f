"""Weights of a merge from how well each model predicts a few examples: LM-Cocktail.

A model's loss is the weighted sum, over sample types, of its mean loss on samples of that type; the
weights are softmax(-loss / temperature) (arXiv 2311.13534, section 3). With refusals among the examples
the merge leans to the models that refuse (arXiv 2406.14563). The result is an ordinary mergekit config.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_align.checks import local_config
from mergekit_align.devices import default_device, default_dtype
from mergekit_align.errors import InputError
from mergekit_align.fingerprint import model_fingerprint
from mergekit_align.samples import SAMPLE_TYPES, Sample, SampleType, load_samples
from mergekit_align.user_cache import user_cache
from mergekit_align.yaml_files import check_section, input_error, read_yaml_mapping

DEFAULT_WEIGHTS: dict[SampleType, float] = {"alignment": 1.0, "task": 0.3, "benign": 0.0}


class CocktailSection(BaseModel):
    """The `align:` section of a mergekit config whose weights are to be found."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str | dict[SampleType, str]
    """Samples: one file of all types, or a file a type. Relative to the working directory."""
    weights: dict[SampleType, float] = DEFAULT_WEIGHTS
    """What each sample type's mean loss counts; a type without a weight counts nothing."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the softmax: a low one gives all to the best model, a high one shares alike."""
    max_per_type: Annotated[int, Field(ge=1)] | Literal["all"] = 5
    """Samples of a type at most, drawn by `seed`."""
    seed: int = 0
    """Draws the samples."""
    batch_size: int | None = Field(default=None, ge=1)
    """Samples in a batch at most; by default as many as a token budget allows."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Floating type of the losses; by default bfloat16, or float32 on a CPU without it."""
    device: str | None = None
    """`cpu`, `cuda` or `cuda:1`; by default a GPU where there is one."""


class Ingredient(NamedTuple):
    """One model of a cocktail."""

    model: str
    losses: dict[SampleType, float]
    """Mean loss on the samples of each type that has a weight, nats a token."""
    loss: float
    """Their weighted sum."""
    weight: float


class Cocktail(NamedTuple):
    """Models with their weights, and the plain mergekit config that has them."""

    ingredients: list[Ingredient]
    config: dict[str, Any]


def read_config(
    path: str | os.PathLike[str], overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], CocktailSection]:
    """A mergekit config without its `align:` section, and that section, `overrides` put in.

    Raises:
        InputError: the file is no config of this kind; names the key.
    """
    content = read_yaml_mapping(path)
    section = content.pop("align", None)
    if not isinstance(section, dict):
        raise InputError.at(
            path, "align", found=repr(section), expected="a mapping with `data:`, the samples"
        )
    return content, check_section(CocktailSection, {**section, **overrides}, path)


def mix(
    path: str | os.PathLike[str],
    *,
    overrides: Mapping[str, Any] | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Cocktail:
    """The cocktail of a config file.

    Args:
        overrides: values of the `align:` section that stand in place of the file's.
        cache: directory of losses that were computed before; `None` for the user's cache.
        progress: told in a line of every model.

    Raises:
        InputError: the config, its models or its samples cannot be used; before a model is loaded.
    """
    from mergekit.config import MergeConfiguration

    content, section = read_config(path, overrides or {})
    try:
        config = MergeConfiguration.model_validate(content)
    except (ValidationError, RuntimeError) as error:
        if isinstance(error, ValidationError):
            raise input_error(error, path, prefix="") from error
        raise InputError(f"{path}: {error}") from error
    entries = _weighted_entries(content, path)
    base = str(config.base_model) if config.base_model else None
    names = list(dict.fromkeys(str(e["model"]) for e in entries if str(e["model"]) != base))
    if len(names) < 2:
        raise InputError.at(
            path, "models", found=f"{len(names)} to be weighed", expected="at least two"
        )
    for name in names:
        local_config(name.partition("+")[0], "models")
    samples = _chosen_samples(section, path, progress)
    losses = [_losses(name, samples, section, cache, progress) for name in names]
    weights = softmax([-loss / section.temperature for _, loss in losses])
    ingredients = [
        Ingredient(name, by_type, loss, weight)
        for name, (by_type, loss), weight in zip(names, losses, weights, strict=True)
    ]
    weight_of = {each.model: each.weight for each in ingredients}
    for entry in entries:
        if str(entry["model"]) in weight_of:
            entry["parameters"] = {
                **(entry.get("parameters") or {}),
                "weight": weight_of[str(entry["model"])],
            }
    return Cocktail(ingredients, content)


def softmax(values: Sequence[float]) -> list[float]:
    """Shares that sum to 1."""
    highest = max(values)
    shares = [math.exp(value - highest) for value in values]
    return [share / sum(shares) for share in shares]


def _weighted_entries(
    content: dict[str, Any], path: str | os.PathLike[str]
) -> list[dict[str, Any]]:
    """The config's models, wherever they stand, none of which has a weight yet."""
    entries = [
        (f"models[{index}]", entry) for index, entry in enumerate(content.get("models") or [])
    ]
    for outer, piece in enumerate(content.get("slices") or []):
        entries += [
            (f"slices[{outer}].sources[{index}]", source)
            for index, source in enumerate(piece.get("sources") or [])
        ]
    for key, entry in entries:
        if "weight" in (entry.get("parameters") or {}):
            raise InputError.at(
                path,
                f"{key}.parameters.weight",
                found=f"{entry['parameters']['weight']} for {entry['model']}",
                expected="none: the weights are what is to be found",
            )
    return [entry for _, entry in entries]


def _chosen_samples(
    section: CocktailSection, path: str | os.PathLike[str], progress: Callable[[str], None]
) -> dict[SampleType, list[Sample]]:
    """Samples of each type that has a weight."""
    files = section.data
    chosen: dict[SampleType, list[Sample]] = {}
    for kind in SAMPLE_TYPES:
        if not section.weights.get(kind):
            continue
        file = files if isinstance(files, str) else files.get(kind)
        every = load_samples(file) if file is not None else []
        samples = [sample for sample in every if sample.type == kind]
        if not samples:
            raise InputError.at(
                path,
                f"align.weights.{kind}",
                found=f"{section.weights[kind]}, but no {kind} sample in {file}",
                expected="some, or a weight of 0",
            )
        if section.max_per_type != "all":
            if section.max_per_type > len(samples):
                progress(
                    f"{path}: align.max_per_type: found {section.max_per_type}; taking the "
                    f"{len(samples)} {kind} samples that there are"
                )
            count = min(section.max_per_type, len(samples))
            samples = random.Random(f"{section.seed} {kind}").sample(samples, count)
        chosen[kind] = samples
    if not chosen:
        raise InputError.at(path, "align.weights", found="no weight", expected="one above 0")
    return chosen


def _losses(
    name: str,
    samples: Mapping[SampleType, Sequence[Sample]],
    section: CocktailSection,
    cache: str | os.PathLike[str] | None,
    progress: Callable[[str], None],
) -> tuple[dict[SampleType, float], float]:
    """A model's mean loss on each type, nats a token, and their weighted sum.

    Raises:
        InputError: the model has no chat template, or a loss is no number.
    """
    from sqlitedict import SqliteDict

    device = section.device or default_device()
    dtype = section.dtype or str(default_dtype(device)).removeprefix("torch.")
    every = [sample for chosen in samples.values() for sample in chosen]
    texts = [[sample.prompt, sample.response] for sample in every]
    parts = [model_fingerprint(name), texts, dtype, device.partition(":")[0]]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    directory = Path(cache) if cache is not None else user_cache("losses")
    directory.mkdir(parents=True, exist_ok=True)
    with SqliteDict(str(directory / "losses.sqlite"), autocommit=True) as known:
        if key not in known:
            progress(f"{name}: reading {len(every)} samples")
            known[key] = _compute(name, every, device, dtype, section.batch_size)
        losses: list[float] = known[key]
    mean: dict[SampleType, float] = {}
    for kind, chosen in samples.items():
        own, losses = losses[: len(chosen)], losses[len(chosen) :]
        mean[kind] = sum(own) / len(own)
        if not math.isfinite(mean[kind]):
            raise InputError(f"{name}: found a loss of {mean[kind]} on {kind} samples")
    return mean, sum(section.weights[kind] * loss for kind, loss in mean.items())


def _compute(
    name: str, samples: Sequence[Sample], device: str, dtype: str, batch_size: int | None
) -> list[float]:
    """Loss of each sample, nats a token; the model is in memory no longer than that."""
    from mergekit.common import ModelReference
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mergekit_align.loss import sample_scores

    reference = ModelReference.parse(name).merged(str(user_cache("lora")))
    place, revision = reference.model.path, reference.model.revision
    tokenizer = AutoTokenizer.from_pretrained(place, revision=revision)
    model = AutoModelForCausalLM.from_pretrained(place, revision=revision, dtype=dtype)
    scores = sample_scores(model.to(device).eval(), tokenizer, samples, max_batch_size=batch_size)
    return [score.loss for score in scores]
