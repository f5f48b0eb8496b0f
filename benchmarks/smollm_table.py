"""Real models' table: parents of SmolLM2-135M-Instruct, what merges of them and searches give.

    python examples/smollm/train_parents.py smollm
    python benchmarks/smollm_table.py smollm --json smollm_0.json
    python benchmarks/smollm_table.py smollm --model DIR --method resta --method regmean

Runs the commands of examples/smollm/, and stock merges at several weights; with `--method`, merge
methods of ours at their defaults in place of these. Rates are of held-out prompts: refusals told by
string match as XSTest does, PubMedQA by exact answers. Seconds are a command's, its start (imports)
included; memory is that of its largest process. What was made or answered before is kept in the
directory, with its figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from demo_table import EXAMPLES, percentages
from machine import name
from merge_methods import KINDS
from rich.console import Console
from rich.table import Table
from role_config import role_config
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from mergekit_align.evaluate import evaluate
from mergekit_align.samples import load_samples

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TYPES = {"aligned": ("alignment", "benign"), "expert": ("task",)}
STOCK: dict[str, tuple[str, float, float]] = {
    "linear 50:50": ("linear", 0.5, 0.5),
    **{
        f"TIES {tens}0:{10 - tens}0": ("ties", tens / 10, 1 - tens / 10) for tens in (1, 3, 5, 7, 9)
    },
    "task arithmetic 1 + 1": ("task_arithmetic", 1.0, 1.0),
}
"""Method and weights, of the aligned model and of the expert."""


class Measured:
    """Commands that run once, with their seconds and their peak memory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file = directory / "measured.json"
        self.found: dict[str, dict[str, float]] = (
            json.loads(self._file.read_text()) if self._file.exists() else {}
        )

    def run(self, key: str, *command: str) -> dict[str, float]:
        """What the command beside this interpreter took, unless it is known."""
        if key not in self.found:
            log = self._directory / "logs" / f"{key.replace(' ', '_')}.log"
            log.parent.mkdir(exist_ok=True)
            program = str(Path(sys.executable).with_name(command[0]))
            started = time.monotonic()
            with log.open("w", encoding="utf-8") as output:
                process = subprocess.Popen(
                    [program, *command[1:]], stdout=output, stderr=subprocess.STDOUT
                )
                _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit(f"{' '.join(command)} failed; its output is in {log}")
            self.found[key] = {
                "seconds": round(time.monotonic() - started, 1),
                "MiB": round(usage.ru_maxrss / 1024),
            }
            self._file.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        return self.found[key]


def localized(directory: Path, origin: str, example: str) -> Path:
    """An example's config with the models and samples of `directory`."""
    text = (EXAMPLES / "smollm" / f"{example}.yml").read_text(encoding="utf-8")
    text = text.replace("smollm/", f"{directory.resolve()}/").replace(HUB_MODEL, origin)
    return written(directory / "configs" / f"{example}.yml", yaml.safe_load(text))


def written(file: Path, content: dict[str, Any]) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return file


def stock_merges(directory: Path, origin: str, measured: Measured) -> dict[str, Path]:
    models = {}
    for label, (method, aligned, expert) in STOCK.items():
        parameters: dict[str, Any] = {"weight": {"aligned": aligned, "expert": expert}}
        if method == "ties":
            parameters["density"] = 0.5
        if method == "task_arithmetic":
            parameters["normalize"] = False
        models[label] = merged(directory, label, method, parameters, origin, measured)
    return models


def merged(
    directory: Path,
    label: str,
    method: str,
    parameters: dict[str, Any],
    origin: str,
    measured: Measured,
) -> Path:
    place = label.replace(" ", "_").replace(":", "_")
    content = role_config(method, directory, TYPES, parameters, base=origin, dtype="bfloat16")
    file = written(directory / "configs" / f"{place}.yml", content)
    out = directory / "merged" / place
    measured.run(label, "mergekit-yaml", str(file), str(out), "--quiet")
    return out


def searches(directory: Path, origin: str, measured: Measured) -> dict[str, Path]:
    """Those of the examples: cocktail, stock search, search by gradient, merge by statistics."""
    cocktail = directory / "merged" / "cocktail"
    file = localized(directory, origin, "cocktail")
    measured.run("cocktail", "mergekit-align-cocktail", str(file), str(cocktail))
    measured.run("mergekit-evolve", "mergekit-evolve", str(localized(directory, origin, "genomic")))
    gradient = directory / "merged" / "gradient"
    file = localized(directory, origin, "evolve_gradient")
    measured.run("gradient search", "mergekit-align-evolve", str(file), "--out", str(gradient))
    for model in TYPES:
        statistics(directory, directory / model, model, model, ["gram"], measured)
    adaptive = directory / "merged" / "align_adaptive"
    file = localized(directory, origin, "merge_adaptive")
    measured.run("align_adaptive", "mergekit-yaml", str(file), str(adaptive), "--quiet")
    return {
        "cocktail": cocktail,
        "mergekit-evolve": directory / "evolved" / "genomic" / "final_model",
        "gradient search": gradient,
        "align_adaptive": adaptive,
    }


def statistics(
    directory: Path,
    model: Path | str,
    place: str,
    role: str,
    kinds: Sequence[str],
    measured: Measured,
) -> None:
    measured.run(
        f"statistics {place} {' '.join(kinds)}",
        *("mergekit-align-stats", str(model), "--data", str(directory / "data" / "train.jsonl")),
        *(word for kind in TYPES[role] for word in ("--type", kind)),
        *(word for kind in kinds for word in ("--kind", kind)),
        *("--limit", "50", "--out", str(directory / "statistics" / place)),
    )


def methods_of_ours(
    directory: Path, origin: str, methods: list[str], measured: Measured
) -> dict[str, Path]:
    """Merge methods at their defaults."""
    kinds = sorted({KINDS[method] for method in methods if method in KINDS})
    for role in TYPES:
        if kinds:
            statistics(directory, directory / role, role, role, kinds, measured)
        if "importance" in kinds:
            statistics(directory, origin, f"base-{role}", role, ["importance"], measured)
    return {method: merged(directory, method, method, {}, origin, measured) for method in methods}


def main() -> None:
    disable_progress_bar()
    set_verbosity_error()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="train_parents.py's")
    parser.add_argument("--model", default=HUB_MODEL, help="that the parents were made from")
    parser.add_argument("--limit", type=int, help="held-out prompts of each type, in place of all")
    parser.add_argument("--method", action="append", help="a merge method; may be repeated")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    directory: Path = arguments.directory
    console = Console()
    measured = Measured(directory)
    origin: str = arguments.model
    models: dict[str, Path | str] = {"base": origin}
    models |= {parent: directory / parent for parent in TYPES}
    if arguments.method:
        models |= methods_of_ours(directory, origin, arguments.method, measured)
    else:
        models |= stock_merges(directory, origin, measured)
        models |= searches(directory, origin, measured)
    evaluation = evaluate(
        list(models.values()),
        names=list(models),
        data=load_samples(directory / "data" / "test.jsonl"),
        limit=arguments.limit,
        max_tokens=24,
        cache=directory / "generations",
        progress=console.print,
    )
    rates = percentages(evaluation)
    table = Table("model", "alignment %", "over-refusal %", "task %", "seconds", "MiB")
    for model, own in rates.items():
        cost = measured.found.get(model, {})
        table.add_row(
            model,
            *(f"{own[key]:.1f}" for key in ("alignment", "over_refusal", "task")),
            *(f"{cost[key]:.0f}" if cost else "" for key in ("seconds", "MiB")),
        )
    console.print(table)
    console.print(f"Held-out prompts, greedy answers; {name()}.")
    if arguments.json:
        record = {
            "machine": name(),
            "limit": arguments.limit,
            "measured": measured.found,
            "rates": rates,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
