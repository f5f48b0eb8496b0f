"""What the in-memory searches of examples/ find on demo worlds, beside the stock command's result.

    python benchmarks/demo_table.py world-1 --seed 1      # trains the world, runs the stock searches
    python benchmarks/evolve_table.py world-1 --seed 1    # then this

Each example runs as it is, `mergekit-align-evolve EXAMPLE --out MODEL`, and so does genomic.yml, which
the stock command has searched. Rates are of held-out prompts, judged by the world's guard; the example
of three models is scored on both skills, beside its parents. Writes `evolve_table.json` into the
world's directory; a search that is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import yaml
from demo_table import held_out, percentages
from evolve import example
from machine import name
from rich.console import Console
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from mergekit_align.evaluate import print_table

SEARCHES = ("genomic", "evolve_gradient", "evolve_floor", "evolve_pareto")
THREE_MODELS = "three_models"
NO_CANDIDATE_KEEPS_THE_FLOORS = 3  # exit status


def search(world: Path, file: str, seed: int) -> tuple[Path, float]:
    """The model that an example's search in memory finds, and the command's seconds."""
    place = world / "searched" / file
    record = place / "seconds.json"
    if not record.exists():
        place.mkdir(parents=True, exist_ok=True)
        config = place / "config.yml"
        content = example(file, world, place, random_seed=seed)
        config.write_text(yaml.safe_dump(content), encoding="utf-8")
        command = str(Path(sys.executable).with_name("mergekit-align-evolve"))
        words = [command, str(config), "--out", str(place / "model")]
        started = time.monotonic()
        with (place / "log").open("w", encoding="utf-8") as output:
            status = subprocess.call(words, stdout=output, stderr=subprocess.STDOUT)
        if status not in (0, NO_CANDIDATE_KEEPS_THE_FLOORS):
            sys.exit(f"mergekit-align-evolve {config} failed; its output is in {place / 'log'}")
        record.write_text(json.dumps(round(time.monotonic() - started, 1)), encoding="utf-8")
    return place / "model", json.loads(record.read_text(encoding="utf-8"))


def main() -> None:
    disable_progress_bar()
    set_verbosity_error()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("world", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    world: Path = arguments.world
    console = Console()
    stages: dict[str, float] = json.loads((world / "table.json").read_text("utf-8"))["seconds"]
    models = {each: world / each for each in ("aligned", "expert-a")}
    stock = "mergekit-evolve genomic.yml"
    models[stock] = world / "evolved" / "genomic" / "final_model"
    seconds = {stock: stages[stock]}
    for file in SEARCHES:
        models[f"{file}.yml"], seconds[f"{file}.yml"] = search(world, file, arguments.seed)
    parents = {f"{each}, both skills": world / each for each in ("aligned", "expert-a", "expert-b")}
    found, seconds[f"{THREE_MODELS}.yml"] = search(world, THREE_MODELS, arguments.seed)
    console.print(seconds)
    both = parents | {f"{THREE_MODELS}.yml, both skills": found}
    evaluations = [
        held_out(world, models, console),
        held_out(world, both, console, both_skills=True),
    ]
    for evaluation in evaluations:
        print_table(evaluation, console)
    record = {
        "machine": name(),
        "dtype": evaluations[0].settings["dtype"],
        "seed": arguments.seed,
        "command": "mergekit-align-evolve",
        "seconds": seconds,
        "rates": percentages(evaluations[0]) | percentages(evaluations[1]),
    }
    (world / "evolve_table.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
