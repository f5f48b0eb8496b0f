"""Seconds an evaluation of the stock `mergekit-evolve`, repaired: on disk against in memory.

    python benchmarks/evolve_stock.py                 # on demo-world/, trained where it is missing
    python benchmarks/evolve_stock.py DIR --evaluations 48

Each way runs twice, with few and with many evaluations, so that the difference is evaluations alone
and what is left is the start: imports, Ray and its workers, the copies of the inputs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from machine import name
from rich.console import Console
from rich.table import Table

from mergekit_align.demo import build_world

EXAMPLES = Path(__file__).parent.parent / "examples"
GENERATION = 8


def seconds(world: Path, evaluations: int, *, in_memory: bool) -> float:
    """Wall time of one whole run, its final model left out."""
    text = (EXAMPLES / "genomic.yml").read_text(encoding="utf-8")
    content = yaml.safe_load(text.replace("demo-world", str(world)))
    with tempfile.TemporaryDirectory() as directory:
        content["align"] |= {
            "task_search_path": [str(EXAMPLES / "tasks")],
            "storage_path": directory,
            "max_fevals": evaluations,
            "force_population_size": GENERATION,
            "in_memory": in_memory,
            "save_final_model": False,
        }
        config = Path(directory) / "genomic.yml"
        config.write_text(yaml.safe_dump(content), encoding="utf-8")
        command = [str(Path(sys.executable).with_name("mergekit-evolve")), str(config)]
        started = time.monotonic()
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
        return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("world", nargs="?", type=Path, default=Path("demo-world"))
    parser.add_argument("--evaluations", type=int, default=48, help="of the longer run")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    build_world(arguments.world)
    world = arguments.world.resolve()
    table = Table("mergekit-evolve", "start, s", "evaluation, s")
    each, start = {}, {}
    for label, in_memory in (("on disk", False), ("in memory", True)):
        few = seconds(world, GENERATION, in_memory=in_memory)
        many = seconds(world, arguments.evaluations, in_memory=in_memory)
        each[label] = (many - few) / (arguments.evaluations - GENERATION)
        start[label] = few - GENERATION * each[label]
        table.add_row(label, f"{start[label]:.1f}", f"{each[label]:.3f}")
    console = Console()
    console.print(name())
    console.print(table)
    console.print(f"in memory is {each['on disk'] / each['in memory']:.2f} times as fast")
    if arguments.json:
        record = {
            "machine": name(),
            "evaluations": arguments.evaluations,
            "evolve_seconds": {way: {"start": start[way], "evaluation": each[way]} for way in each},
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
