"""What a search in memory costs, side by side with the repaired stock command and mergekit's kernels.

    python benchmarks/evolve.py evaluations demo-world     # against mergekit-evolve on disk
    python benchmarks/evolve.py merge BASE MODEL MODEL     # merge steps against mergekit's kernels
    python benchmarks/evolve.py memory BASE MODEL MODEL    # peak memory of merge steps
    python benchmarks/evolve.py gradient world-0 world-1   # gradient against CMA-ES
    python benchmarks/evolve.py racing demo-world          # candidates that stop early against exact

`evaluations` runs examples/genomic.yml, `--limit` samples a task, with few and with many evaluations,
so that the difference is evaluations alone; wall time, medians of three runs, one candidate at a time
on both sides. `merge` gives the time of a step that changes every weight and density, and that of
copying the same bytes: wall time, but the processor's where there is one thread. Both run on a GPU if
there is one. `gradient` compares the same fitness on the same samples, in processor time, and what is
found on held-out ones; several worlds are as many seeds. `racing` does so for CMA-ES on
examples/genomic.yml, medians of `--repeats` runs, and gives both results' fitness on all samples, with
the 95% interval of their difference, the samples being paired; a genome's file in place of the world is
searched as it is.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from machine import clock, copy_rate, forget_peak, memory, name, peak_memory
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from rich.console import Console
from rich.table import Table

import mergekit_align.cli  # noqa: F401 - for its process's settings
from mergekit_align.devices import default_device
from mergekit_align.evolve import Evaluator, EvolveConfig, Search, read_config, search
from mergekit_align.evolve.merging import MergedModel
from mergekit_align.evolve.sample_values import SampleValues

EXAMPLES = Path(__file__).parent.parent / "examples"
CONSOLE = Console()


def example(file: str, world: Path, directory: Path, **align: Any) -> dict[str, Any]:
    """An example's config, of `world`, or that which `world` is, that writes to `directory`."""
    if world.is_file():
        text = world.read_text(encoding="utf-8")
    else:
        text = (EXAMPLES / f"{file}.yml").read_text(encoding="utf-8")
        text = text.replace("demo-world", str(world.resolve()))
    content: dict[str, Any] = yaml.safe_load(text)
    content["align"] |= {
        "task_search_path": [str(EXAMPLES / "tasks")],
        "storage_path": str(directory),
        **align,
    }
    return content


def run(command: str, world: Path, evaluations: int, limit: int | None, **align: Any) -> float:
    """Seconds of a whole run of one of the two commands."""
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        content = example("genomic", world, directory / "out", max_fevals=evaluations, **align)
        content["align"] |= {"force_population_size": 8, "save_final_model": False, "workers": 1}
        if limit is not None:
            content["limit"] = limit
        config = directory / "genomic.yml"
        config.write_text(yaml.safe_dump(content), encoding="utf-8")
        started = time.monotonic()
        result = subprocess.run(
            [str(Path(sys.executable).with_name(command)), str(config)],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            sys.exit(f"{command} failed:\n{result.stderr[-2000:]}")
        return time.monotonic() - started


def evaluations(world: Path, limit: int | None) -> dict[str, Any]:
    few = 16
    found: dict[str, Any] = {}
    sides: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
        ("stock, on disk", "mergekit-evolve", 48, {"in_memory": False}),
        ("ours", "mergekit-align-evolve", 192, {}),
    )
    runs: dict[tuple[str, int], list[float]] = {}
    for _ in range(3):  # in turn: a machine is not as fast from one minute to the next
        for label, command, more, align in sides:
            for count in (few, few + more):
                runs.setdefault((label, count), []).append(
                    run(command, world, count, limit, **align)
                )
    for label, _, more, _ in sides:
        whole, longer = (statistics.median(runs[label, n]) for n in (few, few + more))
        found[label] = {f"whole run of {few}": whole, "evaluation": (longer - whole) / more}
    table = Table("seconds", *found, "times as fast")
    for key in found["ours"]:
        both = [each[key] for each in found.values()]
        table.add_row(key, *(f"{each:.3f}" for each in both), f"{both[0] / both[1]:.1f}")
    CONSOLE.print(table)
    return found


def merge_config(method: str, base: str, models: list[str], scale: float) -> MergeConfiguration:
    own = {"weight": 0.7 * scale, **({"density": 0.5 * scale} if method == "ties" else {})}
    return MergeConfiguration.model_validate(
        {
            "merge_method": method,
            "base_model": None if method == "linear" else base,
            "models": [{"model": model, "parameters": own} for model in models],
            "dtype": "bfloat16",
            "parameters": {"normalize": True},
        }
    )


def merge(base: str, models: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    options = MergeOptions(quiet=True)
    device = default_device()
    for method in ("linear", "task_arithmetic", "ties"):
        each: dict[str, float] = {}
        rates: list[float] = []
        for label, fast in (("mergekit's kernel", False), ("ours", True)):
            start = merge_config(method, base, models, 1.0)
            merged = MergedModel(start, options, device=device, fast=fast)
            steps = []
            for scale in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
                config = merge_config(method, base, models, scale)
                steps.append(_seconds(merged, config, device))
                if fast:  # beside it: a machine's memory is not as fast from one minute to the next
                    rates.append(copy_rate(device))
            each[f"{label}, first"], each[label] = steps[0], statistics.median(steps[1:])
        count = sum(parameter.numel() for parameter in merged.model.parameters())
        bytes_moved = 2 * count * (len(models) + (method != "linear")) + 4 * count
        each["copying the same bytes"] = bytes_moved / statistics.median(rates)
        found[method] = each
        found["parameters"] = count
    table = Table(
        "seconds",
        "first, mergekit's",
        "first, ours",
        "mergekit's",
        "ours",
        "copy",
        "ours / copy",
        "times as fast",
    )
    for method in ("linear", "task_arithmetic", "ties"):
        each = found[method]
        ours, theirs, copy = each["ours"], each["mergekit's kernel"], each["copying the same bytes"]
        firsts = [each["mergekit's kernel, first"], each["ours, first"]]
        cells = [*firsts, theirs, ours, copy]
        table.add_row(
            method, *(f"{x:.3f}" for x in cells), f"{ours / copy:.1f}", f"{theirs / ours:.1f}"
        )
    CONSOLE.print(table)
    CONSOLE.print(f"{found['parameters'] / 1e6:.0f}M parameters")
    return found


def _seconds(merged: MergedModel, config: MergeConfiguration, device: str) -> float:
    started = clock(device)
    merged.merge(config)
    return clock(device) - started


def merge_memory(base: str, models: list[str]) -> dict[str, Any]:
    """Peak memory of merge steps, over what the process held before; each method in one of its own."""
    table = Table("MiB", "the model", "its inputs, once", "peak", "peak / both")
    found: dict[str, Any] = {}
    for method in ("linear", "task_arithmetic", "ties"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            found[method] = each = process.submit(merge_peak, method, base, models).result()
        cells = (f"{each[key] / 2**20:.0f}" for key in ("model", "inputs", "peak"))
        share = each["peak"] / (each["model"] + each["inputs"])
        table.add_row(method, *cells, f"{share:.2f}")
    CONSOLE.print(table)
    return found


def merge_peak(method: str, base: str, models: list[str]) -> dict[str, int]:
    """Bytes of the model, of its inputs, and at most while two candidates are merged.

    Without the libraries' own, PyTorch's and numba's.
    """
    importlib.import_module("mergekit_align.evolve.compiled")
    forget_peak()
    before = memory()
    merged = MergedModel(merge_config(method, base, models, 1.0), MergeOptions(quiet=True))
    for scale in (1.0, 0.9):
        merged.merge(merge_config(method, base, models, scale))
    paths = [*models, *([base] if method != "linear" else [])]
    return {
        "model": sum(each.numel() * each.element_size() for each in merged.model.parameters()),
        "inputs": sum(
            file.stat().st_size for path in paths for file in Path(path).glob("*.safetensors")
        ),
        "peak": peak_memory() - before,
    }


def gradient(worlds: list[Path], limit: int | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    table = Table(
        "world", "CMA-ES, 100", "in s", "gradient", "reached it after s", "share", "held out, both"
    )
    for world in worlds:
        runs = {
            searcher: _climb(world, searcher, count, limit)
            for searcher, count in (("cma", 100), ("gradient", 24))
        }
        target, whole = runs["cma"]["best"][-1], runs["cma"]["seconds"][-1]
        steps = zip(runs["gradient"]["best"], runs["gradient"]["seconds"], strict=True)
        reached = next((seconds for best, seconds in steps if best >= target), None)
        found[world.name] = {**runs, "reached": reached}
        table.add_row(
            world.name,
            f"{target:.4f}",
            f"{whole:.1f}",
            f"{runs['gradient']['best'][-1]:.4f}",
            "never" if reached is None else f"{reached:.1f}",
            "" if reached is None else f"{reached / whole:.2f}",
            " / ".join(f"{each['held_out']:.4f}" for each in runs.values()),
        )
    CONSOLE.print(table)
    return found


def _climb(world: Path, searcher: str, count: int, limit: int | None) -> dict[str, Any]:
    """Best fitness and processor seconds after each evaluation, and the best's on held-out samples."""
    with tempfile.TemporaryDirectory() as place:

        def config(**align: Any) -> EvolveConfig:
            content = example("evolve_gradient", world, Path(place) / "out", budget={})
            content["align"] |= {"searcher": searcher, "max_fevals": count, **align}
            content["limit"] = limit
            path = Path(place) / "config.yml"
            path.write_text(yaml.safe_dump(content), encoding="utf-8")
            return read_config(path)

        times: list[float] = []
        started = time.process_time()
        result = search(config(), progress=lambda line: times.append(time.process_time()))
        best: list[float] = []
        for evaluation in result.evaluations:
            values = evaluation.values or (float("-inf"),)
            best.append(max([*best[-1:], values[0]]))
        assert result.best is not None
        held_out = config(data=str(world.resolve() / "data" / "test.jsonl"))
        score = Evaluator(held_out).evaluate(result.best.genotype).values
        return {
            "seconds": [each - started for each in times],
            "best": best,
            "held_out": score[0] if score else None,
        }


class Run(NamedTuple):
    """A search of examples/genomic.yml."""

    result: Search
    evaluator: Evaluator
    seconds: float
    """Processor time, without setting up."""

    @property
    def samples(self) -> int:
        """Samples that were read, by all candidates."""
        tasks = self.evaluator.fitness.samples.whole.tasks
        every = sum(len(task.instances) for task in tasks.values())
        return sum(each.stopped or every for each in self.result.evaluations)


def racing(
    world: Path, limit: int | None, *, seeds: int, count: int, repeats: int
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    table = Table("seed", "", "exact", "racing", "racing / exact")
    _search(world, 1, 0, racing=False, count=1)  # imports count for neither
    for seed in range(seeds):
        turns = []
        for _ in range(repeats):  # a machine is not as fast from one minute to the next
            runs = [_search(world, limit, seed, racing=on, count=count) for on in (False, True)]
            turns.append([each.seconds for each in runs])
        seconds = [statistics.median(side) for side in zip(*turns, strict=True)]
        for label, digits, both in (
            ("samples read", 0, [float(each.samples) for each in runs]),
            ("processor seconds", 1, seconds),
        ):
            cells = [f"{each:.{digits}f}" for each in both]
            table.add_row(str(seed), label, *cells, f"{both[1] / both[0]:.2f}")
            found[f"{label}, {seed}"] = both
        best = [_by_sample(runs[0].evaluator, each.result) for each in runs]
        fitness = [float(sum(each.mean() for each in own)) for own in best]
        differences = [other - own for own, other in zip(*best, strict=True)]
        error = sum(each.var(ddof=1) / len(each) for each in differences) ** 0.5
        interval = f"{fitness[1] - fitness[0]:+.4f} ± {1.96 * error:.4f}"
        table.add_row(str(seed), "best's fitness", *(f"{each:.4f}" for each in fitness), interval)
        found[f"fitness, {seed}"] = fitness
        found[f"standard error of the difference, {seed}"] = float(error)
    CONSOLE.print(table)
    return found


def _search(world: Path, limit: int | None, seed: int, *, racing: bool, count: int) -> Run:
    with tempfile.TemporaryDirectory() as place:
        content = example("genomic", world, Path(place) / "out", racing=racing)
        content["align"] |= {"random_seed": seed, "max_fevals": count}
        content |= {} if limit is None else {"limit": limit}
        path = Path(place) / "config.yml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        config = read_config(path)
        evaluator = Evaluator(config)
        started = time.process_time()
        result = search(config, evaluator=lambda: evaluator)
        return Run(result, evaluator, time.process_time() - started)


def _by_sample(evaluator: Evaluator, found: Search) -> list[Any]:
    """What the best candidate's fitness is made of: of every task its weighted values, [samples]."""
    assert found.best is not None
    evaluator.merged.merge(found.config.genes.config(found.best.genotype))
    values: SampleValues = {}
    evaluator.fitness.samples.whole.read(values)
    return [task.weight * values[task.name, task.metric] for task in found.config.file.config.tasks]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["evaluations", "merge", "memory", "gradient", "racing"])
    parser.add_argument("paths", nargs="+", help="demo worlds; or base and models")
    parser.add_argument("--limit", type=int, help="samples a task")
    parser.add_argument("--seeds", type=int, default=3, help="of `racing`")
    parser.add_argument("--count", type=int, default=100, help="evaluations of `racing`")
    parser.add_argument("--repeats", type=int, default=3, help="of each search of `racing`")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    machine = name(default_device())
    CONSOLE.print(machine)
    first, *rest = arguments.paths
    found = {
        "evaluations": lambda: evaluations(Path(first), arguments.limit),
        "merge": lambda: merge(first, rest),
        "memory": lambda: merge_memory(first, rest),
        "gradient": lambda: gradient([Path(first), *map(Path, rest)], arguments.limit),
        "racing": lambda: racing(
            Path(first),
            arguments.limit,
            seeds=arguments.seeds,
            count=arguments.count,
            repeats=arguments.repeats,
        ),
    }[arguments.what]()
    if arguments.json:
        names = [Path(each).name for each in arguments.paths]
        record = {"machine": machine, "search": arguments.what, "of": names, "found": found}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
