"""What a search would do, and what it has found: for people."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from mergekit.config import MergeConfiguration
from rich.console import Console
from rich.table import Table

from mergekit_align.evolve.candidate import Evaluator
from mergekit_align.evolve.config import EvolveConfig
from mergekit_align.evolve.fitness import Results
from mergekit_align.evolve.memory import check_memory, memory_needed
from mergekit_align.evolve.ranking import fitness_of
from mergekit_align.evolve.run import Search
from mergekit_align.files import write_text


class Row(NamedTuple):
    """A model of the summary."""

    name: str
    fitness: float
    results: Results


def describe(config: EvolveConfig, console: Console | None = None) -> None:
    """Print what would be searched: genes, memory, and time by one evaluation.

    Raises:
        InputError: it does not fit into memory.
    """
    console = console or Console()
    table = Table("gene", "from", "to", "start")
    for gene in config.genes.every:
        table.add_row(gene.name, *(f"{value:g}" for value in gene[1:]))
    console.print(table)
    need = memory_needed(config)
    console.print(
        f"{len(config.genes)} genes, searched by {config.searcher}. Memory: "
        f"{need.model / 2**20:.0f} MiB for the model, {need.inputs / 2**20:.0f} for its inputs, "
        f"{need.batch / 2**20:.0f} for a batch of samples, on {config.device}."
    )
    check_memory(config, need)
    evaluator = Evaluator(config)
    gradient = config.by_gradient
    evaluator.evaluate(config.genes.low, gradient=gradient)  # the first one is slower
    result = evaluator.evaluate(config.genes.start, gradient=gradient)
    total = result.seconds * config.evaluations
    console.print(
        f"One evaluation takes {result.seconds:.2f} s, {config.evaluations} take "
        f"{total / 60:.1f} minutes."
    )
    if result.failure is not None:
        console.print(f"It failed: {result.failure}")


def summary(found: Search, evaluator: Evaluator) -> list[Row]:
    """The parents, the equal merge, and the best one, on the samples of the search."""
    config = found.config
    genome = config.file.config.genome
    rows = []
    if genome.tokenizer_source is None:  # else a parent is none of the merge's vocabulary
        for model in dict.fromkeys([genome.base_model, *genome.models]):
            if model is not None:
                alone = MergeConfiguration.model_validate(
                    {
                        "merge_method": "linear",
                        "models": [{"model": model, "parameters": {"weight": 1.0}}],
                        "dtype": "bfloat16",
                    }
                )
                rows.append(_row(_short(str(model)), evaluator, alone))
    rows.append(_row("equal merge", evaluator, config.genes.config(config.genes.equal())))
    best = found.best
    if best is not None:
        rows.append(Row("best", fitness_of(config, best), _plain(best.results)))
    return rows


def print_summary(rows: list[Row], console: Console | None = None) -> None:
    console = console or Console()
    columns = [(task, metric) for task, metrics in rows[-1].results.items() for metric in metrics]
    table = Table(
        "model",
        "fitness",
        *(f"{task} {metric.removesuffix(',none')}" for task, metric in columns),
    )
    for row in rows:
        values = [row.results.get(task, {}).get(metric) for task, metric in columns]
        cells = ["" if value is None else f"{value:.4f}" for value in values]
        table.add_row(row.name, f"{row.fitness:.4f}", *cells)
    console.print(table)
    console.print("On the samples of the search.")


def write_front(found: Search) -> list[str]:
    """A config of every candidate of the Pareto front, in `front` in the search's directory."""
    directory = found.config.storage / "front"
    files = []
    for number, each in enumerate(sorted(found.front, key=lambda each: each.values or ())):
        file = directory / f"{number}.yml"
        values = zip(found.config.objectives, each.values or (), strict=True)
        head = "".join(f"# {task} {metric}: {value:.4f}\n" for (task, metric), value in values)
        text = found.config.genes.config(each.genotype).to_yaml()
        write_text(file, f"{head}{text}\n")
        files.append(str(file))
    for stale in directory.glob("*.yml"):
        if str(stale) not in files:
            stale.unlink()
    return files


def write_model(found: Search, out: str | os.PathLike[str]) -> None:
    """The best merge as `mergekit-yaml` writes it."""
    from mergekit.merge import run_merge

    assert found.best is not None
    config = found.config.genes.config(found.best.genotype)
    run_merge(config, os.fspath(out), found.config.merge_options())


def _row(name: str, evaluator: Evaluator, config: MergeConfiguration) -> Row:
    scored = evaluator.score(config)
    return Row(name, scored.score, scored.results)


def _plain(results: Any) -> Results:
    return {task: dict(metrics) for task, metrics in results.items()}


def _short(model: str) -> str:
    return os.path.basename(model.rstrip("/"))
