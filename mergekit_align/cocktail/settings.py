"""A cocktail's config: a mergekit config whose models have no weights, and an `align:` section."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import registered_methods
from mergekit.merge_methods.base import MergeMethod, ParameterScope
from pydantic import BaseModel, ConfigDict, Field

from mergekit_align.checks import check_same_shape, local_config
from mergekit_align.errors import InputError, closest
from mergekit_align.samples import SAMPLE_TYPES, Sample, SampleType, load_samples
from mergekit_align.yaml_files import as_merge_config, check_section, read_yaml_mapping

DEFAULT_WEIGHTS: dict[SampleType, float] = {"alignment": 1.0, "task": 0.3, "benign": 0.0}
_EXPLAINED = "docs/reference.md#cocktail"
Finite = Annotated[float, Field(allow_inf_nan=False)]


class CocktailSection(BaseModel):
    """The `align:` section of a mergekit config whose weights are to be found."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    data: str | dict[SampleType, str]
    """Samples: one file of all types, or a file a type. Relative to the working directory."""
    weights: dict[SampleType, Annotated[Finite, Field(ge=0)]] = DEFAULT_WEIGHTS
    """What each sample type's mean loss counts; a type without a weight counts nothing."""
    temperature: Finite = Field(default=1.0, gt=0)
    """Of the softmax: a low one gives all to the best model, a high one shares alike."""
    max_per_type: Annotated[int, Field(ge=1)] | Literal["all"] = 5
    """Samples of a type at most, drawn by `seed`."""
    seed: int = 0
    """Draws the samples."""
    batch_size: int | None = Field(default=None, ge=1)
    """Samples in a batch at most; by default as many as a token budget allows."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Floating type of the losses; by default bfloat16, or float32 on a CPU without it."""
    device: str | None = Field(default=None, pattern=r"^(cpu|cuda(:\d+)?|auto)$")
    """`cpu`, `cuda`, `cuda:1`, or `auto`: spread over all GPUs; by default a GPU where there is one."""
    solve: bool = False
    """Minimise the merged model's own loss, from the softmax's weights on."""
    max_steps: int = Field(default=10, ge=1)
    """Gradient steps of `solve` at most."""
    floors: dict[SampleType, Finite] = {}
    """Mean log-probability (nats/token) of a type's samples that `solve` must keep."""
    granularity: int | None = Field(default=None, ge=1)
    """Layers that share a weight in `solve`; by default a model has one weight."""


class CocktailConfig(NamedTuple):
    """A config file, read and checked."""

    path: str
    content: dict[str, Any]
    """The mapping without its `align:` section."""
    section: CocktailSection
    merge: MergeConfiguration
    """`content`, as mergekit reads it."""
    models: list[ModelReference]
    """Those to be weighed, each once."""

    def with_weights(self, weights: Mapping[ModelReference, Any]) -> dict[str, Any]:
        """`content` with each model's `weight`, a plain mergekit config."""
        content = copy.deepcopy(self.content)
        for _, entry in _entries(content):
            model = ModelReference.model_validate(entry["model"])
            if model in weights:
                entry["parameters"] = {
                    **(entry.get("parameters") or {}),
                    "weight": weights[model],
                }
        return content


def read_config(
    path: str | os.PathLike[str],
    overrides: Mapping[str, Any] | None = None,
    *,
    allow_crimes: bool = False,
) -> CocktailConfig:
    """The config in a file, `overrides` put into its `align:` section.

    Args:
        allow_crimes: as mergekit's option: the models may differ in architecture.

    Raises:
        InputError: it cannot be used; before any weight is read.
    """
    path = os.fspath(path)
    content = read_yaml_mapping(path)
    given = content.pop("align", None)
    if not isinstance(given, dict):
        raise InputError.at(
            path, "align", found=repr(given), expected="a mapping with `data:`, the samples"
        )
    section = check_section(
        CocktailSection, {**given, **(overrides or {})}, path, explained=_EXPLAINED
    )
    merge = as_merge_config(content, path)
    weighs_base = _weighs_base(merge.merge_method, path)
    _check_unweighted(content, path)
    models = list(
        dict.fromkeys(
            reference
            for _, entry in _entries(content)
            if (reference := ModelReference.model_validate(entry["model"])) != merge.base_model
            or weighs_base
        )
    )
    if len(models) < 2:
        raise InputError.at(
            path, "models", found=f"{len(models)} to be weighed", expected="at least two"
        )
    named = [("models", model.model.path) for model in models]
    if merge.base_model is not None:
        named.append(("base_model", merge.base_model.model.path))
    if merge.models and not allow_crimes:
        check_same_shape(named, path)
    else:
        for key, name in named:
            local_config(name, f"{path}: {key}")
    _check_solvable(section, merge, path)
    return CocktailConfig(path, content, section, merge, models)


def draw_samples(
    config: CocktailConfig, progress: Callable[[str], None] = lambda line: None
) -> dict[SampleType, list[Sample]]:
    """Samples of each type that has a weight, or a floor.

    Raises:
        InputError: there are none of such a type.
    """
    section = config.section
    chosen: dict[SampleType, list[Sample]] = {}
    for kind, samples in _samples_by_type(config).items():
        wanted = section.weights.get(kind) or kind in section.floors
        if not wanted:
            continue
        if not samples:
            key, value = (
                ("weights", section.weights[kind])
                if section.weights.get(kind)
                else ("floors", section.floors[kind])
            )
            raise InputError.at(
                config.path,
                f"align.{key}.{kind}",
                found=f"{value}, but no {kind} sample in the data",
                expected="some, or a weight of 0",
            )
        if section.max_per_type != "all":
            if section.max_per_type > len(samples):
                progress(
                    f"{config.path}: align.max_per_type: found {section.max_per_type}; taking the "
                    f"{len(samples)} {kind} samples that there are"
                )
            count = min(section.max_per_type, len(samples))
            samples = random.Random(f"{section.seed} {kind}").sample(samples, count)
        chosen[kind] = samples
    if not any(section.weights.get(kind) for kind in chosen):
        raise InputError.at(config.path, "align.weights", found="no weight", expected="one above 0")
    return chosen


def types_in_data(config: CocktailConfig) -> list[SampleType]:
    """Sample types that the data holds."""
    return [kind for kind, samples in _samples_by_type(config).items() if samples]


def _samples_by_type(config: CocktailConfig) -> dict[SampleType, list[Sample]]:
    files = config.section.data
    by_file: dict[str, list[Sample]] = {}
    found: dict[SampleType, list[Sample]] = {}
    for kind in SAMPLE_TYPES:
        file = files if isinstance(files, str) else files.get(kind)
        if file is not None and file not in by_file:
            by_file[file] = load_samples(file)
        found[kind] = [s for s in by_file.get(file or "", []) if s.type == kind]
    return found


def _weighs_base(method_name: str, path: str) -> bool:
    """Whether a merge method weighs its base model as well as the others.

    Raises:
        InputError: there is no such method, or its models have no `weight`.
    """
    weighing: dict[str, MergeMethod] = {
        method.spec.name: method
        for method in registered_methods()
        if any(p.name == "weight" and _is_per_model(p.scope) for p in method.spec.parameters)
    }
    if method_name not in weighing:
        raise InputError.at(
            path,
            "merge_method",
            found=repr(method_name),
            expected="one whose models have a `weight`: "
            f"{', '.join(sorted(weighing))}{closest(method_name, weighing)}",
        )
    (weight,) = (p for p in weighing[method_name].spec.parameters if p.name == "weight")
    return bool(weight.scope == ParameterScope.INPUT)


def _is_per_model(scope: ParameterScope) -> bool:
    return scope in (ParameterScope.INPUT, ParameterScope.NON_BASE)


def _outputs(content: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """What holds `models:` or `slices:`, by what stands before these: the config, or its modules."""
    modules = content.get("modules") or {}
    return [("", content), *((f"modules.{name}.", module) for name, module in modules.items())]


def _entries(content: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The config's models, wherever they stand, by their keys."""
    entries: list[tuple[str, dict[str, Any]]] = []
    for prefix, output in _outputs(content):
        for index, entry in enumerate(output.get("models") or []):
            entries.append((f"{prefix}models[{index}]", entry))
        for outer, piece in enumerate(output.get("slices") or []):
            for index, source in enumerate(piece.get("sources") or []):
                entries.append((f"{prefix}slices[{outer}].sources[{index}]", source))
    return entries


def _check_unweighted(content: Mapping[str, Any], path: str) -> None:
    places: list[tuple[str, Mapping[str, Any], str]] = [
        (f"{key}.", entry, f" for {entry['model']}") for key, entry in _entries(content)
    ]
    for prefix, output in _outputs(content):
        places.append((prefix, output, " for all models"))
        for index, piece in enumerate(output.get("slices") or []):
            places.append((f"{prefix}slices[{index}].", piece, " for its sources"))
    for key, place, whom in places:
        if "weight" in (place.get("parameters") or {}):
            raise InputError.at(
                path,
                f"{key}parameters.weight",
                found=f"{place['parameters']['weight']}{whom}",
                expected="none: the weights are what is to be found",
            )


def _check_solvable(section: CocktailSection, merge: MergeConfiguration, path: str) -> None:
    if not section.solve:
        for key in ("floors", "granularity"):
            if getattr(section, key):
                raise InputError.at(
                    path, f"align.{key}", found=getattr(section, key), expected="it with `solve`"
                )
        return
    linear = ("linear", "task_arithmetic")
    if merge.merge_method not in linear:
        raise InputError.at(
            path,
            "align.solve",
            found=f"true with {merge.merge_method}",
            expected=f"a merge that is linear in its weights: {' or '.join(linear)}",
        )
    if not merge.models:
        raise InputError.at(path, "align.solve", found="true without `models:`", expected="them")
    if "lambda" in (merge.parameters or {}):
        raise InputError.at(
            path,
            "parameters.lambda",
            found=(merge.parameters or {})["lambda"],
            expected="none with `align.solve`, whose weights sum to 1",
        )
