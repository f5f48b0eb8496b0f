"""Where a search starts: weights that were found otherwise, or an earlier search's best."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mergekit.evo.genome import METHOD_PARAM_MAPS

from mergekit_align.errors import InputError
from mergekit_align.evolve.study import read_study
from mergekit_align.yaml_files import read_yaml_mapping

if TYPE_CHECKING:
    from mergekit_align.evolve.genes import Gene
    from mergekit_align.genome_config import GenomeFile


def warm_start(genes: list[Gene], file: GenomeFile) -> list[Gene]:
    """The genes, started where `align: warm_start:` says.

    A mergekit config (what `mergekit-align-cocktail` writes) gives every gene of a model's weight that
    weight, which must be one number; a study gives its best candidate, whose genes must be these.

    Raises:
        InputError: it is neither, or is of other models or genes.
    """
    where = file.section.warm_start
    if where is None:
        return genes
    key = "align.warm_start"
    if where.endswith((".yml", ".yaml")):
        starts = _weights(where, file, key, genes)
    else:
        config, evaluations = read_study(where)
        done = [each for each in evaluations if each.complete and not each.violation]
        if not done:
            raise InputError.at(
                file.path, key, found=f"no feasible candidate in {where}", expected="one"
            )
        best = max(done, key=lambda each: each.values or ())
        known, wanted = [name for name, *_ in config["genes"]], [gene.name for gene in genes]
        if known != wanted:
            raise InputError.at(
                file.path,
                key,
                found=f"{len(known)} genes in {where}, {', '.join(known[:4])}, ...",
                expected=f"this genome's {len(wanted)}: {', '.join(wanted[:4])}, ...",
            )
        starts = best.genotype.tolist()
    return [
        gene._replace(start=min(max(start, gene.low), gene.high))
        for gene, start in zip(genes, starts, strict=True)
    ]


def _weights(where: str, file: GenomeFile, key: str, genes: list[Gene]) -> list[float]:
    entries = read_yaml_mapping(Path(where)).get("models") or []
    weights = {
        str(each.get("model")): (each.get("parameters") or {}).get("weight") for each in entries
    }
    starts = [gene.start for gene in genes]
    genome = file.config.genome
    models = [str(model) for model in genome.models]
    per_model = (len(genome.filters or []) + 1) * len(METHOD_PARAM_MAPS[genome.merge_method])
    for index, gene in enumerate(genes):
        if not gene.name.startswith("weight "):
            continue
        model = models[index // per_model % len(models)]
        weight = weights.get(model)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise InputError.at(
                file.path,
                key,
                found=f"weight {weight} of {model} in {where}",
                expected="a number",
            )
        starts[index] = float(weight)
    return starts
