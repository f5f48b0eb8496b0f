"""Generated data against the grammar's own, on the demo world: the same merges, on either.

    python benchmarks/generated_table.py                       # on demo-world/
    python benchmarks/generated_table.py world-1 --seed 1      # trains the world where it is missing

`mergekit-align-generate examples/generate.yml` makes the data; a cocktail of the two parents and a
search by the stock `mergekit-evolve examples/genomic.yml` are then run on it, and on the grammar's
samples (a search that is there already is taken as it is). Prints the table, judged by the guard on
held-out prompts, and how far apart the two are, in points; writes both into the world as
`generated_table.json`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import yaml
from demo_table import EXAMPLES, held_out, percentages, search
from machine import name
from mergekit.options import MergeOptions
from rich.console import Console
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from mergekit_align import cocktail as cocktails
from mergekit_align.demo import build_world
from mergekit_align.evaluate import print_table
from mergekit_align.generate import generate, print_funnel, read_config

COCKTAIL_SAMPLES = 100
"""Of a type: so many that the draw does not show."""


def generated_data(world: Path, seed: int, console: Console) -> Path:
    """The directory of the samples that the example's config gives on `world`."""
    text = (EXAMPLES / "generate.yml").read_text(encoding="utf-8")
    text = text.replace("demo-world", str(world)).replace("examples/", f"{EXAMPLES}/")
    config = world / "generate.yml"
    config.write_text(yaml.safe_dump({**yaml.safe_load(text), "seed": seed}), encoding="utf-8")
    generated = generate(read_config(config), progress=console.print)
    print_funnel(generated.funnel, console)
    for key, (found, wanted) in generated.short.items():
        console.print(f"{key}: {found} questions; {wanted} were asked for. Goes on with these.")
    return generated.output / "data"


def mixed(world: Path, kind: str, data: Path, console: Console) -> Path:
    """Both parents as a cocktail, weighed on `data`."""
    content = {
        "merge_method": "linear",
        "models": [{"model": f"{world}/{parent}"} for parent in ("aligned", "expert-a")],
        "dtype": "bfloat16",
        "align": {"data": str(data), "max_per_type": COCKTAIL_SAMPLES},
    }
    path = world / f"cocktail-{kind}.yml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    config = cocktails.read_config(path)
    cocktail = cocktails.mix(config, cache=world / "losses")
    assert cocktail is not None
    weights = ", ".join(f"{each.model} {each.weight:.3f}" for each in cocktail.ingredients)
    console.print(f"cocktail on the {kind} data: {weights}")
    out = world / "merged" / f"cocktail-{kind}"
    cocktails.merge(cocktail, config, out, MergeOptions(quiet=True))
    return out


def main() -> None:
    disable_progress_bar()
    set_verbosity_error()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("world", nargs="?", type=Path, default=Path("demo-world"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    world: Path = arguments.world
    console = Console(width=160)
    started = time.monotonic()
    build_world(world, seed=arguments.seed, writer=True)
    data = generated_data(world, arguments.seed, console)
    models = {
        "cocktail, grammar": mixed(world, "grammar", world / "data" / "train.jsonl", console),
        "cocktail, generated": mixed(world, "generated", data / "train.jsonl", console),
    }
    found = world / "evolved" / "genomic" / "final_model"
    models["search, grammar"] = (
        found if found.exists() else search(world, "genomic", arguments.seed)
    )
    models["search, generated"] = search(
        world, "genomic", arguments.seed, data=data / "validation.jsonl"
    )
    evaluation = held_out(world, models, console)
    print_table(evaluation, console)
    rates = percentages(evaluation)
    differences = {}
    for way in ("cocktail", "search"):
        generated, grammar = rates[f"{way}, generated"], rates[f"{way}, grammar"]
        differences[way] = {
            key: round(float(generated[key] or 0) - float(grammar[key] or 0), 1)
            for key in ("alignment", "task", "over_refusal")
        }
        console.print(f"{way}: generated minus grammar, points: {differences[way]}")
    console.print(f"{time.monotonic() - started:.0f} s in all")
    record = {
        "machine": name(),
        "dtype": evaluation.settings["dtype"],
        "seed": arguments.seed,
        "rates": rates,
        "differences": differences,
    }
    (world / "generated_table.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
