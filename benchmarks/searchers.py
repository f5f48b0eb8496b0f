"""The same fitness, as often evaluated: mergekit's own search, mergenetic's, and ours.

    pip install pymoo
    python benchmarks/searchers.py world-0 world-1 world-2 --seeds 3 --json searchers.json

The fitness and the genome are those of examples/evolve_gradient.yml. mergekit's search is the stock
`mergekit-evolve`. mergenetic (arXiv 2505.11427) needs mergekit 0.0.6, vLLM and a GPU, and cannot run
beside them; its search is pymoo's genetic algorithm with the operators of its examples, on the genome
that it gives to task arithmetic: one weight for each model, in tenths from 0 to 1. It evaluates here in
memory, as ours do. What is random is drawn anew for each of the `--seeds`; several worlds are as many
seeds of the models.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from evolve import example
from machine import name
from mergekit.config import MergeConfiguration
from pymoo.algorithms.soo.nonconvex.ga import GA
from pymoo.core.problem import ElementwiseProblem
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from pymoo.operators.sampling.rnd import IntegerRandomSampling
from pymoo.optimize import minimize
from rich.console import Console
from rich.table import Table

from mergekit_align.evolve import Evaluator, EvolveConfig, read_config, search

GENERATIONS = 5


class Tenths(ElementwiseProblem):  # type: ignore[misc]
    """mergenetic's discrete genome: each number from 0 to 10."""

    def __init__(self, evaluator: Evaluator, genes: int) -> None:
        super().__init__(n_var=genes, n_obj=1, xl=0, xu=10)
        self._evaluator = evaluator

    def _evaluate(self, x: Any, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        found = self._evaluator.evaluate(np.asarray(x, dtype=float) / 10)
        out["F"] = -found.values[0] if found.values else np.inf


class World:
    """Searches of one demo world, what they write in a directory of their own."""

    def __init__(self, world: Path, directory: Path, evaluations: int, seed: int) -> None:
        self._world = world
        self._directory = directory
        self._evaluations = evaluations
        self._seed = seed

    def stock(self) -> MergeConfiguration:
        out = self._directory / "stock"
        own = {
            "max_fevals": self._evaluations,
            "random_seed": self._seed,
            "save_final_model": False,
            "workers": 1,
        }
        file = self._write("stock", example("evolve_gradient", self._world, out, **own))
        command = Path(sys.executable).with_name("mergekit-evolve")
        subprocess.run([str(command), str(file)], capture_output=True, check=True)
        content = yaml.safe_load((out / "best_config.yaml").read_text(encoding="utf-8"))
        return MergeConfiguration.model_validate(content)

    def mergenetic(self) -> MergeConfiguration:
        content = example("evolve_gradient", self._world, self._directory / "mergenetic")
        for key in ("filters", "layer_granularity"):
            content["genome"].pop(key, None)
        content["align"].pop("start", None)
        config = read_config(self._write("mergenetic", content))
        algorithm = GA(
            pop_size=self._evaluations // GENERATIONS,
            sampling=IntegerRandomSampling(),
            crossover=SBX(),
            mutation=PM(),
            eliminate_duplicates=True,
        )
        problem = Tenths(Evaluator(config), len(config.genes))
        found = minimize(problem, algorithm, ("n_eval", self._evaluations), seed=self._seed)
        return config.genes.config(np.asarray(found.X, dtype=float) / 10)

    def ours(self, searcher: str) -> MergeConfiguration:
        config = self.config(searcher, searcher=searcher, budget={})
        found = search(config)
        assert found.best is not None
        return config.genes.config(found.best.genotype)

    def config(self, label: str, **align: Any) -> EvolveConfig:
        align = {"max_fevals": self._evaluations, "random_seed": self._seed, **align}
        content = example("evolve_gradient", self._world, self._directory / label, **align)
        return read_config(self._write(label, content))

    def _write(self, label: str, content: dict[str, Any]) -> Path:
        file = self._directory / f"{label}.yml"
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        return file


def _fitness(place: Path, evaluations: int, seed: int, console: Console) -> dict[str, list[float]]:
    """What each search finds: its fitness on the search's samples and on held-out ones."""
    with tempfile.TemporaryDirectory() as directory:
        world = World(place, Path(directory), evaluations, seed)
        found = {
            "mergekit-evolve": world.stock(),
            "mergenetic's": world.mergenetic(),
            "cma": world.ours("cma"),
            "gradient": world.ours("gradient"),
        }
        test = str(place.resolve() / "data" / "test.jsonl")
        configs = [world.config("validation"), world.config("held_out", data=test)]
        judges = [Evaluator(config) for config in configs]
        fitness = {
            label: [judge.score(merge).score for judge in judges] for label, merge in found.items()
        }
        console.print(
            place.name, seed, {label: round(both[0], 4) for label, both in fitness.items()}
        )
        return fitness


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("worlds", nargs="+", type=Path, help="demo worlds")
    parser.add_argument("--evaluations", type=int, default=100, help="of each search")
    parser.add_argument("--seeds", type=int, default=3, help="of each search")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    console = Console()
    table = Table("world", "search", "fitness", "on held-out samples")
    fitness: dict[str, dict[str, list[list[float]]]] = {}
    for place in arguments.worlds:
        runs = [
            _fitness(place, arguments.evaluations, seed, console) for seed in range(arguments.seeds)
        ]
        fitness[place.name] = {label: [run[label] for run in runs] for label in runs[0]}
        for label, found in fitness[place.name].items():
            means = [sum(each) / len(each) for each in zip(*found, strict=True)]
            table.add_row(place.name, label, *(f"{each:.4f}" for each in means))
    console.print(table)
    console.print(name())
    if arguments.json:
        record = {
            "machine": name(),
            "evaluations": arguments.evaluations,
            "fitness": fitness,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
