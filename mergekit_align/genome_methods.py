"""Genomes over any registered merge method that has a number for each model.

Upstream's table names five methods; the rest of the registry is added here, weight first. Such a
method starts at its own defaults, where upstream would start every parameter after the first at 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from mergekit.evo import genome as evo_genome
from mergekit.merge_methods import registered_methods
from mergekit.merge_methods.base import MISSING, MergeMethod, ParameterScope

if TYPE_CHECKING:
    from mergekit_align.merge_methods.roles import Role

FRACTIONS = ("density", "gamma", "epsilon")
_upstream_methods = frozenset(evo_genome.METHOD_PARAM_MAPS)


def per_model_numbers(method: MergeMethod) -> list[str]:
    """Names of a method's numeric per-model parameters, `weight` first."""
    names = [
        parameter.name
        for parameter in method.spec.parameters
        if parameter.scope in (ParameterScope.INPUT, ParameterScope.NON_BASE)
        and parameter.value_type in (float, int)
    ]
    return sorted(names, key=lambda name: name != "weight")


def extend_genome() -> None:
    """Add the registry's methods to the genome's table; may be called again after registrations."""
    for method in registered_methods():
        names = per_model_numbers(method)
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
        roles = dict(zip(self.definition.models, getattr(self, "roles", ()), strict=False))
        genotype = self._to_torch(genotype).clone()
        for index, name in enumerate(evo_genome.METHOD_PARAM_MAPS[method]):
            if name in FRACTIONS:
                genotype[..., index] = genotype[..., index].abs().clamp(0, 1)
        config = original_config(self, genotype)
        if self.definition.normalize is None:
            config.parameters.pop("normalize", None)
        for source in (source for piece in config.slices for source in piece.sources):
            if source.model in roles:
                source.parameters = {**(source.parameters or {}), "role": roles[source.model]}
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


def give_genomes_roles(roles: Sequence[Role]) -> None:
    """Let every genome of this process have models of these `roles`, in the models' order."""
    genome = evo_genome.ModelGenome
    original = genome.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        # Kept with the genome, which travels to Ray's workers.
        self.roles = tuple(roles)

    genome.__init__ = __init__


def _start_at_defaults(start: torch.Tensor, method_name: str) -> None:
    (method,) = (m for m in registered_methods() if m.spec.name == method_name)
    defaults = {parameter.name: parameter.default for parameter in method.spec.parameters}
    for index, name in enumerate(evo_genome.METHOD_PARAM_MAPS[method_name]):
        if name != "weight" and defaults[name] is not MISSING:
            start[..., index] = float(defaults[name])
