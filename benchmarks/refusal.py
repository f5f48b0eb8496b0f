"""How often our refusal scorer agrees with people, beside XSTest's own string match.

    git clone https://github.com/paul-rottger/exaggerated-safety
    python benchmarks/refusal.py exaggerated-safety
    python benchmarks/refusal.py xstest_v2_completions_gpt4.csv ...
    python benchmarks/refusal.py exaggerated-safety --guard smollm/guard \
        --guard-profile examples/smollm/refusal_guard.yaml

The clone's `model_completions/` holds five models' 450 completions of XSTest's prompts, each with the
class that people gave it (arXiv 2308.01263). The patterns were tuned on two of the models, on nothing
of the others'. Agreement is the share of completions whose class is the people's: of three classes, and
of two (any refusal or none). Their match has no partial class. A guard that tells refusals from
answers ("safe" and "unsafe") may stand beside them.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from mergekit_align.errors import InputError
from mergekit_align.guard import Conversation, Guard, GuardSettings, load_guard
from mergekit_align.refusal import RefusalClass, refusal_class, xstest_strmatch

PREFIX = "xstest_v2_completions_"
TUNED_ON = ("llama2orig", "mistralguard")
CLASSES: dict[str, RefusalClass] = {
    "1_full_compliance": "full compliance",
    "2_full_refusal": "full refusal",
    "3_partial_refusal": "partial refusal",
}


class Labelled(NamedTuple):
    """A completion and the class that people gave it."""

    prompt: str
    completion: str
    people: RefusalClass


class Agreement(NamedTuple):
    """Percentages of completions."""

    three_classes: float
    refusal_or_not: float


def files_of(paths: Sequence[Path]) -> list[Path]:
    """The CSV files among `paths` and in the directories among them; an `InputError` if none."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file or directory")
        files += sorted(path.rglob(f"{PREFIX}*.csv")) if path.is_dir() else [path]
    # The clone has copies with automatic labels beside the completions.
    files = [file for file in files if file.parent.name != "automated_evaluation_labels"]
    if not files:
        named = ", ".join(map(str, paths))
        raise InputError(
            f"{named}: found no {PREFIX}*.csv; see --help for where they are published"
        )
    return files


def read(file: Path) -> list[Labelled]:
    """The labelled completions in a file."""
    rows = []
    with file.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        for column in ("prompt", "completion", "final_label"):
            if column not in (reader.fieldnames or ()):
                columns = ", ".join(reader.fieldnames or ()) or "none"
                raise InputError.at(file, "columns", found=columns, expected=f"among them {column}")
        for row in reader:
            if row["final_label"] not in CLASSES:
                raise InputError.at(
                    file,
                    f"line {reader.line_num}: final_label",
                    found=repr(row["final_label"]),
                    expected=" or ".join(CLASSES),
                )
            rows.append(Labelled(row["prompt"], row["completion"], CLASSES[row["final_label"]]))
    if not rows:
        raise InputError.at(file, "rows", found="none", expected="a completion each")
    return rows


def agreement(rows: Sequence[Labelled], told: Sequence[RefusalClass | None]) -> Agreement:
    """How often what is `told` is the people's class; `None` never is."""
    pairs = [(own, row.people) for own, row in zip(told, rows, strict=True)]
    complies = "full compliance"
    return Agreement(
        100 * mean(ours == people for ours, people in pairs),
        100
        * mean(
            ours is not None and (ours == complies) == (people == complies)
            for ours, people in pairs
        ),
    )


SCORERS = tuple(
    f"{scorer}, {classes}"
    for classes in ("3 classes", "2 classes")
    for scorer in ("ours", "XSTest's")
)


class Row(NamedTuple):
    """A file's, or a mean of files'."""

    model: str
    patterns: str
    """Whether ours were tuned on it."""
    figures: list[float]
    """By `SCORERS`."""


def told_by(guard: Guard, rows: Sequence[Labelled]) -> list[RefusalClass | None]:
    """What a guard takes each completion for; `None` where its verdict is unreadable."""
    classes: dict[str, RefusalClass] = {"safe": "full refusal", "unsafe": "full compliance"}
    verdicts = guard.judge([Conversation.of(row.prompt, row.completion) for row in rows])
    return [classes.get(verdict.label) for verdict in verdicts]


def rows_of(files: Sequence[Path], guard: Guard | None = None) -> list[Row]:
    """A row for each file, and the means of the tuned and of the held-out ones."""
    found: list[Row] = []
    each: dict[str, list[list[float]]] = {"tuned": [], "held out": []}
    for file in files:
        model = file.stem.removeprefix(PREFIX)
        role = "tuned" if model in TUNED_ON else "held out"
        rows = read(file)
        ours, theirs = (
            agreement(rows, [scorer(row.completion) for row in rows])
            for scorer in (refusal_class, xstest_strmatch)
        )
        figures = [
            *(ours.three_classes, theirs.three_classes),
            *(ours.refusal_or_not, theirs.refusal_or_not),
        ]
        if guard is not None:
            figures.append(agreement(rows, told_by(guard, rows)).refusal_or_not)
        each[role].append(figures)
        found.append(Row(model, role, figures))
    for role, models in each.items():
        if models:
            means = [mean(column) for column in zip(*models, strict=True)]
            found.append(Row(f"mean of {len(models)}, {role}", role, means))
    return found


def scorers_of(rows: Sequence[Row]) -> Sequence[str]:
    """A heading for each figure."""
    return [*SCORERS, "the guard, 2 classes"][: len(rows[0].figures)]


def table(rows: Sequence[Row]) -> Table:
    result = Table("model", "patterns", title="agreement of scorers with people, %")
    for scorer in scorers_of(rows):
        result.add_column(scorer.replace(", ", ",\n"), justify="right")
    for row in rows:
        result.add_row(row.model, row.patterns, *(f"{figure:.1f}" for figure in row.figures))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, help="the clone, or the CSV files")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--guard", help="a guard that tells refusals from answers")
    parser.add_argument("--guard-profile", help="its profile: a name, or a YAML file")
    arguments = parser.parse_args()
    try:
        files = files_of(arguments.paths)
        guard = None
        if arguments.guard:
            guard = load_guard(
                GuardSettings(model=arguments.guard, profile=arguments.guard_profile)
            )
        rows = rows_of(files, guard)
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    Console().print(table(rows))
    if arguments.json:
        record = {
            "scorers": scorers_of(rows),
            "agreement_with_people": {
                row.model: {"patterns": row.patterns, "agreement": row.figures} for row in rows
            },
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
