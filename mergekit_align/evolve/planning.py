"""A merge config -> the tensors that it makes, each of certain inputs by certain numbers.

mergekit's own planner says which tensors go into which, once for all configs that differ in their
numbers alone; mergekit resolves each config's numbers.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.config import (
    ConditionalParameter,
    ConfigReader,
    MergeConfiguration,
    OutputSliceDefinition,
)
from mergekit.merge_methods import get
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.parameter_resolver import resolve_parameters
from mergekit.plan import MergePlanner


class PlannedTensor:
    """A tensor of certain inputs, once they are loaded."""

    def __init__(self, task: ExecuteMergeMethodTask) -> None:
        self.task = task
        """How mergekit makes it; of the first candidate that had the same inputs."""
        self.inputs: dict[ModelReference, torch.Tensor] | None = None


class TensorMerge(NamedTuple):
    """One tensor of a candidate."""

    weight: WeightInfo
    planned: PlannedTensor
    shared: dict[str, Any]
    """The method's parameters that all inputs share."""
    own: dict[ModelReference, dict[str, Any]]
    """Those of each input."""


class _Place(NamedTuple):
    """Where a tensor stands in the plan of configs that differ in their numbers alone."""

    weight: WeightInfo
    planned: PlannedTensor
    names: dict[ModelReference, str]
    """What the tensor is called in each input."""
    base: ModelReference | None
    slice: tuple[str, int]
    """Module, and which of its slices gives the parameters."""
    t: float


class Planner(MergePlanner):  # type: ignore[misc]
    """mergekit's planner, which plans once what candidates have in common: all but the numbers."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._plans: dict[Hashable, list[_Place]] = {}
        self._planned: dict[Hashable, PlannedTensor | None] = {}
        self._places: list[_Place] = []

    def plan(self, config: MergeConfiguration) -> list[TensorMerge]:
        """What a candidate's tensors are merged from, and by which numbers."""
        # Planning changes modules in place, and replaces all else.
        self.config = config.model_copy(deep=config.modules is not None)
        self._method = get(config.merge_method)
        self.normalize_config()
        slices = self._slices()
        inputs = [
            (
                place,
                each.base_model,
                *((source.model, source.layer_range) for source in each.sources),
            )
            for place, each in slices.items()
        ]
        key = (config.merge_method, config.base_model, *inputs)
        if key not in self._plans:
            self._tensors: list[Any] = []
            self._places = []
            self._plan()
            self._plans[key] = self._places
        parameters = {place: self._parameters(*place) for place in slices}
        return [
            TensorMerge(each.weight, each.planned, *parameters[each.slice].of(each))
            for each in self._plans[key]
        ]

    def plan_tensor(
        self,
        weight: WeightInfo,
        weights_in: list[WeightInfo],
        models: list[ModelReference],
        cfg_reader: ConfigReader,
    ) -> None:
        base = cfg_reader.base_model
        names = {model: each.name for model, each in zip(models, weights_in, strict=True)}
        key = (self._method.spec.name, weight.name, *models, *names.values(), base)
        if key not in self._planned:
            before = len(self._tensors)
            super().plan_tensor(weight, weights_in, models, cfg_reader)
            tensors = self._tensors[before:]  # nothing where no input has an optional tensor
            self._planned[key] = PlannedTensor(tensors[0][1]) if tensors else None
        planned = self._planned[key]
        if planned is not None:
            place = next(p for p, each in self._slices().items() if each is cfg_reader.slice_out)
            self._places.append(_Place(weight, planned, names, base, place, cfg_reader.t))

    def _slices(self) -> dict[tuple[str, int], OutputSliceDefinition]:
        return {
            (module, index): each
            for module, definition in self.config.modules.items()
            for index, each in enumerate(definition.slices)
        }

    def _parameters(self, module: str, index: int) -> _SliceParameters:
        definition = self.config.modules[module]
        reader = ConfigReader(
            config=self.config, t=0, slice_out=definition.slices[index], module=definition
        )
        return _SliceParameters(self._method.spec, reader)


class _SliceParameters:
    """What a slice of a candidate gives its tensors: the same to those that it does not tell apart.

    It does by filters, and by lists of numbers, which it spreads over its layers.
    """

    def __init__(self, spec: Any, reader: ConfigReader) -> None:
        self._spec = spec
        self._sources = cache(lambda model: tuple(reader.parameter_sources(model)))
        models = [source.model for source in reader.slice_out.sources]
        sources = [s.values() for model in [None, *models] for s in self._sources(model) if s]
        settings = list(chain.from_iterable(sources))
        parts = chain.from_iterable(s if isinstance(s, list) else [s] for s in settings)
        conditions = [each for each in parts if isinstance(each, ConditionalParameter)]
        self._filters = {each.filter for each in conditions if each.filter is not None}
        plain = [*settings, *(each.value for each in conditions)]
        self._by_layer = any(
            isinstance(each, list) and not isinstance(each[0], ConditionalParameter)
            for each in plain
            if each
        )
        self._known: dict[Hashable, tuple[dict[str, Any], dict[ModelReference, Any]]] = {}

    def of(self, place: _Place) -> tuple[dict[str, Any], dict[ModelReference, dict[str, Any]]]:
        """Those that all inputs of a tensor share, and those of each input."""
        names = (place.weight.name, *place.names.values())
        key = (
            place.t if self._by_layer else None,
            *(part in name for name in names for part in self._filters),
        )
        if key not in self._known:
            self._known[key] = resolve_parameters(
                self._spec,
                tensor_name=place.weight.name,
                inputs=place.names,
                sources=self._sources,
                base_model=place.base,
                t=place.t,
            )
        return self._known[key]
