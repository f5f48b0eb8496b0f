"""The demo world's table: what plain merging, and three searches by the stock command, give.

    python benchmarks/demo_table.py                       # on demo-world/, as `make demo` does
    python benchmarks/demo_table.py world-1 --seed 1      # trains the world where it is missing

Prints the table and the seconds of each stage, and writes both into the world's directory: the rates as
`table.json`, and all that `mergekit-align-evaluate` writes as `evaluation.json` and `evaluation.md`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from machine import name
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from rich.console import Console
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from mergekit_align.demo import build_world
from mergekit_align.evaluate import Evaluation, evaluate, print_table
from mergekit_align.samples import Sample, load_samples

EXAMPLES = Path(__file__).parent.parent / "examples"
SEARCHES = {
    "task-only evolution": "genomic_task_only",
    "the paper's objective": "genomic_paper",
    "ours": "genomic",
}


def equal_merge(world: Path, method: str) -> Path:
    """Both parents at weight 0.5 by `method`, TIES at density 0.5."""
    parameters = {"weight": 0.5, **({"density": 0.5} if method == "ties" else {})}
    config = {
        "merge_method": method,
        "models": [
            {"model": f"{world}/{name}", "parameters": parameters}
            for name in ("aligned", "expert-a")
        ],
        "dtype": "bfloat16",
        "parameters": {"normalize": True},
    }
    if method == "ties":
        config["base_model"] = f"{world}/base"
    out = world / "merged" / method
    run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(quiet=True))
    return out


def search(world: Path, example: str, seed: int, *, data: Path | None = None) -> Path:
    """The model that the stock command finds for an example's config, moved to `world`.

    With `data`, on these samples rather than the example's.
    """
    text = (EXAMPLES / f"{example}.yml").read_text(encoding="utf-8")
    content = yaml.safe_load(text.replace("demo-world", str(world)))
    content["align"]["task_search_path"] = [str(EXAMPLES / "tasks")]
    content["align"]["random_seed"] = seed
    name = example
    if data is not None:
        name = f"{example}-{data.parent.parent.name}"
        content["align"]["data"] = str(data)
        content["align"]["storage_path"] = str(world / "evolved" / name)
    config = world / f"{name}.yml"
    config.write_text(yaml.safe_dump(content), encoding="utf-8")
    log = world / f"{name}.log"
    command = [str(Path(sys.executable).with_name("mergekit-evolve")), str(config)]
    with log.open("w", encoding="utf-8") as output:
        result = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
    if result.returncode:
        sys.exit(f"mergekit-evolve {config} failed; its output is in {log}")
    return Path(content["align"]["storage_path"]) / "final_model"


def first_skill(samples: Sequence[Sample]) -> list[Sample]:
    """Those that `aligned` and `expert-a` can be right about: the third model's skill is left out."""
    return [sample for sample in samples if sample.category != "skill-b"]


def held_out(
    world: Path,
    models: Mapping[str, Path],
    console: Console,
    *,
    both_skills: bool = False,
    output: Path | None = None,
) -> Evaluation:
    """What named models answer to a world's held-out prompts, judged by its guard."""
    every = load_samples(world / "data" / "test.jsonl")
    return evaluate(
        list(models.values()),
        names=list(models),
        data=every if both_skills else first_skill(every),
        guard=world / "guard",
        max_tokens=64,
        output=output,
        cache=world / "generations",
        progress=console.print,
    )


def main() -> None:
    disable_progress_bar()
    set_verbosity_error()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("world", nargs="?", type=Path, default=Path("demo-world"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--search",
        choices=sorted(SEARCHES.values()),
        action="append",
        help="search this only; may be repeated",
    )
    parser.add_argument(
        "--without-third",
        action="store_true",
        help="leave out the world's third model, of which no row is made",
    )
    arguments = parser.parse_args()
    world: Path = arguments.world
    console = Console()
    seconds: dict[str, float] = {}

    def took(stage: str, taken: float) -> None:
        seconds[stage] = round(taken, 1)
        console.print(f"{stage}: {seconds[stage]} s")

    def timed(stage: str, started: float) -> None:
        took(stage, time.monotonic() - started)

    build_world(world, seed=arguments.seed, third=not arguments.without_third)
    trained = json.loads((world / "world.json").read_text(encoding="utf-8"))["models"]
    # Now, or by a run before.
    took("train the world", sum(trained[each]["seconds"] for each in trained.keys() - {"writer"}))
    models = {each: world / each for each in ("base", "aligned", "expert-a")}
    started = time.monotonic()
    models["linear 50/50"] = equal_merge(world, "linear")
    models["TIES 50/50"] = equal_merge(world, "ties")
    timed("merge equally, twice", started)
    for label, example in SEARCHES.items():
        if arguments.search and example not in arguments.search:
            continue
        started = time.monotonic()
        models[label] = search(world, example, arguments.seed)
        timed(f"mergekit-evolve {example}.yml", started)

    started = time.monotonic()
    evaluation = held_out(world, models, console, output=world / "evaluation")
    timed("evaluate", started)

    print_table(evaluation, console)
    console.print(f"Held-out prompts, greedy answers; {name()}.")
    record = {
        "machine": name(),
        "dtype": evaluation.settings["dtype"],
        "seed": arguments.seed,
        "seconds": seconds,
        "rates": percentages(evaluation),
    }
    (world / "table.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def percentages(evaluation: Evaluation) -> dict[str, dict[str, float | int | None]]:
    """Each model's rates in percent, and how many of its responses the guard could not read."""
    return {
        model: {
            **{key: 100 * each.scores[model].value for key, each in evaluation.columns.items()},
            "unreadable": evaluation.unreadable(model),
        }
        for model in evaluation.models
    }


if __name__ == "__main__":
    main()
