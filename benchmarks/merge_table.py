"""Merge methods on demo worlds, ours and stock ones: at their defaults, and at the best of a grid.

    python benchmarks/merge_table.py world-0 world-1 world-2 --json merge_table.json
    python benchmarks/merge_table.py world-0 --method resta --method regmean

Every method merges `aligned` and `expert-a`, with `base` as the base where it takes one. Its grid has
four settings, the first of them the paper's or mergekit's default; the best on validation prompts, by
alignment + task - over-refusal, is shown beside the default, both on held-out prompts judged by the
world's guard. Statistics are of validation samples. What was merged and answered before is kept in
each world's directory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import machine
from demo_table import first_skill
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from rich.console import Console
from rich.table import Table
from role_config import role_config
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from mergekit_align.devices import default_dtype
from mergekit_align.evaluate import evaluate
from mergekit_align.merge_methods.methods import METHODS
from mergekit_align.samples import SampleType, load_samples
from mergekit_align.statistics.collect import Source, collect_statistics
from mergekit_align.statistics.files import Kind
from mergekit_align.statistics.propagate import collect_propagated

Parameters = dict[str, Any]
PARENTS = ("aligned", "expert-a")
TYPES: dict[str, list[SampleType]] = {"aligned": ["alignment", "benign"], "expert-a": ["task"]}


def weights(aligned: float, expert: float, **more: Any) -> Parameters:
    """Parameters with a weight for each parent."""
    return {"weight": {"aligned": aligned, "expert-a": expert}, **more}


GRID: dict[str, list[Parameters]] = {
    "linear": [weights(w, 1 - w) for w in (0.5, 0.3, 0.7, 0.85)],
    "slerp": [{"t": t} for t in (0.5, 0.3, 0.7, 0.15)],
    "task_arithmetic": [weights(a, b) for a, b in ((1, 1), (1, 1.2), (0.7, 1), (0.7, 0.7))],
    "ties": [
        weights(a, b, density=0.5, normalize=n)
        for a, b, n in ((1, 1, True), (1, 1, False), (0.7, 0.3, True), (1, 0.6, False))
    ],
    "dare_ties": [
        weights(a, b, density=0.5, normalize=n)
        for a, b, n in ((1, 1, True), (1, 1, False), (0.7, 0.3, True), (1, 0.6, False))
    ],
    "model_stock": [{}],
    "sce": [{"select_topk": k} for k in (0.1, 0.3, 0.5, 1.0)],
    "align_adaptive": [
        weights(1, b, interference=m) for b, m in ((1, 0.1), (1, 0.05), (1.2, 0.1), (1.2, 0.2))
    ],
    "fisher": [{"alignment_weight": w} for w in (1.0, 0.3, 3.0, 10.0)],
    "led": [{"ratio": r} for r in (0.5, 0.3, 0.7, 0.9)],
    "lox": [{"rank": r, "alpha": a} for r, a in ((6, 1.25), (6, 0.5), (16, 1.25), (16, 0.5))],
    "lssf": [{"alpha": a, "eta": e} for a, e in ((1.0, 0.5), (1.0, 0.8), (0.7, 0.8), (0.7, 0.5))],
    "regmean": [{"alignment_weight": w} for w in (1.0, 0.3, 3.0, 10.0)],
    "regmean_plus": [{"alignment_weight": w} for w in (1.0, 0.3, 3.0, 10.0)],
    "resta": [{"gamma": g} for g in (1.0, 0.5, 0.75, 1.5)],
    "safe_lora": [{"tau": t} for t in (0.35, 0.2, 0.5, 0.7)],
    "safemerge": [
        {"tau": t, "alpha": a} for t, a in ((0.7, 0.5), (0.35, 0.5), (0.7, 0.8), (1, 0.9))
    ],
}
"""For each method, its default first. Parents' updates are from `base`: both were made from it."""


class Rates(NamedTuple):
    """Of one merged model, shares of prompts."""

    alignment: float
    over_refusal: float
    task: float

    @property
    def balance(self) -> float:
        return self.alignment + self.task - self.over_refusal


class Merged(NamedTuple):
    model: Path
    seconds: float
    """Of the merge alone; statistics are taken once for all."""


def merge(world: Path, method: str, number: int, parameters: Parameters) -> Merged:
    """`method` at a setting, merged into the world's directory unless it is there already."""
    base = f"{world}/{'aligned' if method == 'slerp' else 'base'}"
    content = role_config(method, world, PARENTS, parameters, base=base, dtype="float32")
    config = MergeConfiguration.model_validate(content)
    out = world / "methods" / f"{method}-{number}"
    record = out / "seconds.json"
    if method == "regmean_plus" and not record.exists():
        for file in (world / "statistics").glob("*/*.propagated_gram.safetensors"):
            file.unlink()
        collect_propagated(config)
    if not record.exists():
        started = time.perf_counter()
        run_merge(config, str(out), MergeOptions(quiet=True))
        record.write_text(json.dumps(time.perf_counter() - started))
    return Merged(out, json.loads(record.read_text()))


def take_statistics(world: Path, limit: int) -> float:
    """Statistics of the parents, and of the base on their samples; their seconds."""
    source = Source([world / "data" / "validation.jsonl"], limit=limit)
    kinds: list[Kind] = ["gram", "importance", "fisher"]
    started = time.perf_counter()
    for name, types in TYPES.items():
        own = world / "statistics"
        collect_statistics(f"{world}/{name}", source, own / name, kinds=kinds, types=types)
        collect_statistics(
            f"{world}/base", source, own / f"base-{name}", kinds=["importance"], types=types
        )
    return time.perf_counter() - started


def rates(
    world: Path, models: dict[str, Path], split: str, *, limit: int | None, guard: bool
) -> dict[str, Rates]:
    evaluation = evaluate(
        list(models.values()),
        names=list(models),
        data=first_skill(load_samples(world / "data" / f"{split}.jsonl")),
        limit=limit,
        guard=world / "guard" if guard else None,
        max_tokens=64,
        cache=world / "generations",
    )
    columns = evaluation.columns
    return {
        name: Rates(
            *(columns[key].scores[name].value for key in ("alignment", "over_refusal", "task"))
        )
        for name in models
    }


def compare(world: Path, methods: list[str], limit: int, console: Console) -> dict[str, Any]:
    """Held-out rates of each method's default and best setting, and of the parents."""
    console.print(f"{world}: statistics in {take_statistics(world, limit):.1f} s")
    found: dict[str, Any] = {}
    parents = {name: world / name for name in ("base", *PARENTS)}
    for name, own in rates(world, parents, "test", limit=None, guard=True).items():
        found[name] = {"default": own._asdict()}
    for method in methods:
        merged = [merge(world, method, n, each) for n, each in enumerate(GRID[method])]
        names = {f"{method} {n}": each.model for n, each in enumerate(merged)}
        validation = rates(world, names, "validation", limit=limit, guard=False)
        best = max(range(len(merged)), key=lambda n: list(validation.values())[n].balance)
        held_out = rates(
            world,
            {"default": merged[0].model, **({"best": merged[best].model} if best else {})},
            "test",
            limit=None,
            guard=True,
        )
        found[method] = {
            "default": held_out["default"]._asdict(),
            "best": held_out.get("best", held_out["default"])._asdict(),
            "setting": GRID[method][best],
            "seconds": merged[0].seconds,
            "validation": [each._asdict() for each in validation.values()],
        }
        console.print(f"{world}: {method}: {found[method]['default']} {found[method]['best']}")
    return found


def cell(values: list[float]) -> str:
    """Mean and range over seeds, in percent."""
    mean = f"{100 * statistics.mean(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def main() -> None:
    disable_progress_bar()
    set_verbosity_error()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("worlds", nargs="+", type=Path)
    parser.add_argument("--method", action="append", choices=sorted(GRID), help="may be repeated")
    parser.add_argument("--limit", type=int, default=100, help="validation prompts of each type")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    console = Console()
    methods = arguments.method or list(GRID)
    worlds = {
        str(world): compare(world, methods, arguments.limit, console) for world in arguments.worlds
    }
    table = Table("method", "setting", "alignment %", "over-refusal %", "task %", "seconds")
    for name in next(iter(worlds.values())):
        own = [found[name] for found in worlds.values()]
        for setting in ("default", "best"):
            if setting in own[0]:
                columns = [cell([each[setting][key] for each in own]) for key in Rates._fields]
                seconds = (
                    f"{statistics.mean(each['seconds'] for each in own):.1f}"
                    if "seconds" in own[0]
                    else ""
                )
                table.add_row(name, setting, *columns, seconds)
    console.print(machine.name())
    console.print(table)
    if arguments.json:
        ours = [method.spec.name for method in METHODS]
        dtype = str(default_dtype("cpu")).removeprefix("torch.")
        record = {"machine": machine.name(), "dtype": dtype, "worlds": worlds, "ours": ours}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
