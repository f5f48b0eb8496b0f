"""A genome as a flat vector of bounded numbers, and back as a plain mergekit config."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from mergekit.config import MergeConfiguration
from mergekit.evo.genome import METHOD_PARAM_MAPS, ModelGenome
from numpy.typing import NDArray

from mergekit_align.errors import InputError
from mergekit_align.evolve.warm_start import warm_start
from mergekit_align.genome_methods import gene_range, start_at

if TYPE_CHECKING:
    from mergekit_align.genome_config import GenomeFile

Array = NDArray[np.float64]
Genotype = Array
"""The genes of a candidate, [genes]."""


class Gene(NamedTuple):
    """One number that a search finds."""

    name: str
    low: float
    high: float
    start: float


class Genes:
    """The genes of a genome config, in the order in which mergekit's genotype has them.

    Raises:
        InputError: the bounds or the start cannot be used.
    """

    def __init__(self, file: GenomeFile) -> None:
        definition = file.config.genome
        if definition.layer_granularity > 0:
            layers = definition.models[0].config().num_hidden_layers
            if layers % definition.layer_granularity:
                raise InputError.at(
                    file.path,
                    "genome.layer_granularity",
                    found=definition.layer_granularity,
                    expected=f"a divisor of the {layers} layers",
                )
        self._genome = ModelGenome(definition)
        self._genome.fixed = tuple(file.fixed)
        initial = self._genome.initial_genotype()
        start = start_at(initial, definition.merge_method, file.section.start or {})
        self.shape: tuple[int, ...] = tuple(start.shape)
        """Of a genotype: groups of layers, models, filters, parameters."""
        self.models = [str(model) for model in definition.models]
        method = definition.merge_method
        known = self.parameters = METHOD_PARAM_MAPS[method]
        bounds = _bounds(file, dict(zip(known, initial[0, 0, 0].tolist(), strict=True)))
        names = _names(self._genome, start.shape)
        parameters = known * (start.numel() // start.shape[-1])
        genes = [
            Gene(name, *bounds[parameter], value)
            for name, parameter, value in zip(
                names, parameters, start.flatten().tolist(), strict=True
            )
        ]
        self.every = warm_start(genes, file)
        for gene, parameter in zip(genes, parameters, strict=True):
            if not gene.low <= gene.start <= gene.high:
                raise InputError.at(
                    file.path,
                    f"align.start.{parameter}",
                    found=f"{gene.start:g}",
                    expected=f"a number within its bounds, {gene.low:g} to {gene.high:g}",
                )

    def __len__(self) -> int:
        return len(self.every)

    @property
    def start(self) -> Genotype:
        return np.array([gene.start for gene in self.every])

    @property
    def low(self) -> Array:
        return np.array([gene.low for gene in self.every])

    @property
    def high(self) -> Array:
        return np.array([gene.high for gene in self.every])

    def equal(self) -> Genotype:
        """What mergekit starts from: all models alike."""
        start: Genotype = self._genome.initial_genotype().flatten().double().numpy()
        return start

    def config(self, genotype: Genotype) -> MergeConfiguration:
        """The mergekit config that a candidate stands for."""
        return self._genome.genotype_merge_config(
            torch.from_numpy(np.asarray(genotype, dtype=np.float64)).view(self.shape)
        )


def _bounds(file: GenomeFile, defaults: Mapping[str, float]) -> Mapping[str, tuple[float, float]]:
    """Range of each parameter; wide enough for its default, unless the method forbids it."""
    definition = file.config.genome
    bounds: dict[str, tuple[float, float]] = {}
    least: dict[str, float] = {}
    for name in defaults:
        low, high = (0.0, 1.0) if name == "t" else gene_range(definition.merge_method, name)
        least[name] = low if definition.allow_negative_weights else max(low, 0.0)
        bounds[name] = (max(least[name], -2.0), min(high, max(2.0, 2 * defaults[name])))
    for name, (low, high) in file.section.bounds.items():
        key = f"align.bounds.{name}"
        if name not in defaults:
            raise InputError.at(
                file.path,
                key,
                found="an unknown parameter",
                expected=f"one of {', '.join(defaults)}, as {definition.merge_method} has them",
            )
        if not least[name] <= low < high:
            raise InputError.at(
                file.path,
                key,
                found=[low, high],
                expected=f"two rising numbers from {least[name]:g} on",
            )
        bounds[name] = (low, high)
    return bounds


def _names(genome: ModelGenome, shape: tuple[int, ...]) -> list[str]:
    definition = genome.definition
    groups, _, _, _ = shape
    step = definition.layer_granularity
    models = [os.path.basename(str(model).rstrip("/")) for model in definition.models]
    if len(set(models)) < len(models):
        models = [str(model) for model in definition.models]
    filters = [*(definition.filters or []), "others" if definition.filters else ""]
    names = []
    for group in range(groups):
        layers = f"layers {group * step}-{(group + 1) * step - 1}" if step > 0 else ""
        for model in models:
            for tensors in filters:
                for parameter in METHOD_PARAM_MAPS[definition.merge_method]:
                    place = ", ".join(part for part in (model, layers, tensors) if part)
                    names.append(f"{parameter} ({place})")
    return names
