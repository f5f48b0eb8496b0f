"""Genomes over any registered merge method that has a number for each model.

Upstream's table names five methods; the rest of the registry is added here, weight first. Such a
method starts at its own defaults, where upstream would start every parameter after the first at 1. A
number that a method of ours has once for all models is a gene too: upstream's genotypes have a value
for every model, whose mean it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args, get_origin

import torch
from mergekit.evo import genome as evo_genome
from mergekit.merge_methods import get, registered_methods
from mergekit.merge_methods.base import MISSING, MergeMethod, ParameterScope, ParameterSpec

from mergekit_align.merge_methods.methods import METHODS

_FRACTIONS = ("density", "gamma", "epsilon")
"""Of stock methods, whose ranges are not declared."""
_STEP = 1e-3
"""How near a parameter comes to a bound that it may not reach."""
_upstream_methods = frozenset(evo_genome.METHOD_PARAM_MAPS)


def gene_names(method: MergeMethod) -> list[str]:
    """A method's numbers for each model, `weight` first, and those that ours have for all models."""
    own = method in METHODS
    numbers = [
        parameter
        for parameter in method.spec.parameters
        if _number(parameter) in (float, int) and (own or parameter.scope != ParameterScope.SHARED)
    ]
    numbers.sort(key=lambda p: (p.name != "weight", p.scope == ParameterScope.SHARED))
    return [parameter.name for parameter in numbers]


def gene_range(method: str, name: str) -> tuple[float, float]:
    """Least and greatest value of a parameter; infinite where the method sets no limit."""
    parameter = _parameters(method)[name]
    if name in _FRACTIONS and parameter.scope != ParameterScope.SHARED:
        return 0.0, 1.0
    low, high = -math.inf, math.inf
    kind = parameter.value_type
    for field in get_args(kind)[1:] if get_origin(kind) is Annotated else ():
        for bound in field.metadata:
            low = max(low, getattr(bound, "ge", low), getattr(bound, "gt", low - _STEP) + _STEP)
            high = min(high, getattr(bound, "le", high))
    return low, high


def _number(parameter: ParameterSpec) -> Any:
    """A parameter's type, without its range."""
    kind = parameter.value_type
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _parameters(method: str) -> dict[str, ParameterSpec]:
    return {parameter.name: parameter for parameter in get(method).spec.parameters}


def extend_genome() -> None:
    """Add the registry's methods to the genome's table; may be called again after registrations."""
    for method in registered_methods():
        names = gene_names(method)
        if names and method.spec.name not in evo_genome.METHOD_PARAM_MAPS:
            evo_genome.METHOD_PARAM_MAPS[method.spec.name] = names
    original = evo_genome.ModelGenome.initial_genotype
    if getattr(original, "starts_at_defaults", False):
        return

    def initial_genotype(self: Any, random: bool = False) -> torch.Tensor:
        start: torch.Tensor = original(self, random)
        method = self.definition.merge_method
        if not random and method not in _upstream_methods:
            _start_at_defaults(start, method)
        return start

    initial_genotype.starts_at_defaults = True  # type: ignore[attr-defined]
    evo_genome.ModelGenome.initial_genotype = initial_genotype

    original_config = evo_genome.ModelGenome.genotype_merge_config

    def genotype_merge_config(self: Any, genotype: Any) -> Any:
        method = self.definition.merge_method
        if method in _upstream_methods:
            return original_config(self, genotype)
        fixed = dict(zip(self.definition.models, getattr(self, "fixed", ()), strict=False))
        spec = _parameters(method)
        names = evo_genome.METHOD_PARAM_MAPS[method]
        shared = {name for name in names if spec[name].scope == ParameterScope.SHARED}
        genotype = self._to_torch(genotype).clone()
        for index, name in enumerate(names):
            values = genotype[..., index]
            if name in shared:
                values[:] = values.mean(1, keepdim=True)
            low, high = gene_range(method, name)
            if low == 0:
                values.abs_()
            values.clamp_(low, high)
            if _number(spec[name]) is int:
                values.round_()
        config = original_config(self, genotype)
        if self.definition.normalize is None:
            config.parameters.pop("normalize", None)
        for place in config.slices or [config]:
            for source in place.sources if config.slices else place.models:
                given = source.parameters or {}
                # All models have one value of these.
                place.parameters = {
                    **(place.parameters or {}),
                    **{name: given[name] for name in shared & given.keys()},
                }
                own = {name: value for name, value in given.items() if name not in shared}
                source.parameters = {**own, **fixed.get(source.model, {})} or None
        return config

    evo_genome.ModelGenome.genotype_merge_config = genotype_merge_config


def start_genomes_at(values: Mapping[str, float]) -> None:
    """Let every search of this process start at `values`, by parameter, unless its start is random."""
    genome = evo_genome.ModelGenome
    original = genome.initial_genotype

    def initial_genotype(self: Any, random: bool = False) -> torch.Tensor:
        start: torch.Tensor = original(self, random)
        return start if random else start_at(start, self.definition.merge_method, values)

    genome.initial_genotype = initial_genotype


def start_at(start: torch.Tensor, method: str, values: Mapping[str, float]) -> torch.Tensor:
    """A genotype [layer groups, models, tensor filters, parameters] with `values` by parameter."""
    start = start.clone()
    for index, name in enumerate(evo_genome.METHOD_PARAM_MAPS[method]):
        if name in values:
            start[..., index] = values[name]
    return start


def fix_genomes(fixed: Sequence[Mapping[str, str]]) -> None:
    """Let every genome of this process have models of these parameters, in the models' order."""
    genome = evo_genome.ModelGenome
    original = genome.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        # Kept with the genome, which travels to Ray's workers.
        self.fixed = tuple(fixed)

    genome.__init__ = __init__


def _start_at_defaults(start: torch.Tensor, method_name: str) -> None:
    defaults = {name: each.default for name, each in _parameters(method_name).items()}
    for index, name in enumerate(evo_genome.METHOD_PARAM_MAPS[method_name]):
        if name != "weight" and defaults[name] is not MISSING:
            start[..., index] = float(defaults[name])
