"""A genome may use any method that mergekit has registered with numeric per-model parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.evo.genome import METHOD_PARAM_MAPS, ModelGenome, ModelGenomeDefinition
from mergekit.merge import run_merge
from mergekit.merge_methods import get, registered_methods
from mergekit.merge_methods.base import ParameterScope
from mergekit.options import MergeOptions

from mergekit_align.genome_methods import start_genomes_at

UPSTREAMS = {
    "linear": ["weight"],
    "task_arithmetic": ["weight"],
    "ties": ["weight", "density"],
    "dare_ties": ["weight", "density"],
    "slerp": ["t"],
}


def genome(world: Path, method: str, **more: Any) -> ModelGenome:
    definition = {
        "merge_method": method,
        "base_model": f"{world}/base",
        "models": [f"{world}/aligned", f"{world}/expert-a"],
        **more,
    }
    return ModelGenome(ModelGenomeDefinition.model_validate(definition))


def test_upstreams_own_methods_keep_their_parameters() -> None:
    assert {name: METHOD_PARAM_MAPS[name] for name in UPSTREAMS} == UPSTREAMS


def test_every_registered_method_with_numbers_per_model_is_there() -> None:
    expected = {
        method.spec.name
        for method in registered_methods()
        for parameter in method.spec.parameters
        if parameter.value_type in (float, int) and parameter.scope != ParameterScope.SHARED
    }
    assert expected <= set(METHOD_PARAM_MAPS)
    assert len(expected - set(UPSTREAMS)) >= 5


ADDED = sorted(set(METHOD_PARAM_MAPS) - set(UPSTREAMS))


@pytest.mark.parametrize("method", ADDED)
def test_an_added_methods_genotypes_are_configs_of_it(world: Path, method: str) -> None:
    start = genome(world, method).initial_genotype()
    config = genome(world, method).genotype_merge_config(start)
    again = MergeConfiguration.model_validate(config.model_dump())
    assert again.merge_method == method
    names = METHOD_PARAM_MAPS[method]
    assert start.shape == (1, 2, 1, len(names))
    (layers,) = config.slices
    spec = {parameter.name: parameter for parameter in get(method).spec.parameters}
    shared = {name for name in names if spec[name].scope == ParameterScope.SHARED}
    assert set(layers.parameters or {}) == shared
    assert all(
        set(names) - shared == set(source.parameters)
        for source in layers.sources
        if source.parameters
    )
    for name in names:
        if name != "weight":
            found = (layers.parameters or {}) if name in shared else layers.sources[0].parameters
            assert spec[name].validate(found[name]) == pytest.approx(spec[name].default)


def test_a_number_for_all_models_is_the_mean_of_its_genes(world: Path) -> None:
    lox = genome(world, "lox")
    genotype = lox.initial_genotype()
    names = METHOD_PARAM_MAPS["lox"]
    genotype[0, 0, 0, names.index("alpha")] = 0.5
    genotype[0, 1, 0, names.index("alpha")] = 0.9
    genotype[..., names.index("rank")] = -7.6
    config = lox.genotype_merge_config(genotype)
    assert config.slices[0].parameters["alpha"] == pytest.approx(0.7)
    assert config.slices[0].parameters["rank"] == 1
    assert all(set(s.parameters or {}) <= {"weight"} for s in config.slices[0].sources)


def test_an_added_methods_genotype_merges(world: Path, tmp_path: Path) -> None:
    breadcrumbs = genome(world, "breadcrumbs")
    config = breadcrumbs.genotype_merge_config(breadcrumbs.initial_genotype())
    run_merge(config, str(tmp_path / "out"), MergeOptions(quiet=True))
    assert list((tmp_path / "out").glob("*.safetensors"))


def test_fractions_stay_fractions(world: Path) -> None:
    breadcrumbs = genome(world, "breadcrumbs")
    genotype = torch.full_like(breadcrumbs.initial_genotype(), -3.0)
    config = breadcrumbs.genotype_merge_config(genotype)
    for source in config.slices[0].sources:
        if source.parameters:
            assert source.parameters["density"] == 1
            assert source.parameters["weight"] == 3


def test_a_search_starts_where_it_is_told_to(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelGenome, "initial_genotype", ModelGenome.initial_genotype)
    start_genomes_at({"weight": 0.75})
    ties = genome(world, "ties")
    assert ties.initial_genotype()[..., 0].unique().tolist() == [0.75]
    assert ties.initial_genotype()[..., 1].unique().tolist() == [1.0]
    assert len(ties.initial_genotype(random=True)[..., 0].unique()) == 2


def test_references_to_models_survive(world: Path) -> None:
    config = genome(world, "breadcrumbs").genotype_merge_config(torch.ones(1, 2, 1, 3))
    assert config.base_model == ModelReference.parse(f"{world}/base")
