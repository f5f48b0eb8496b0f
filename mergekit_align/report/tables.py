"""Tables of a report, of text and numbers, whatever format they end in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mergekit_align import markdown
from mergekit_align.evaluate import Evaluation
from mergekit_align.evaluate.report import cells
from mergekit_align.report.study_file import StudyRecord


class Cell(NamedTuple):
    """One entry of a table."""

    lines: list[str]
    sort: float | str
    """What the column is sorted by."""


class Table(NamedTuple):
    """A table whose rows begin with what they are about."""

    title: str
    head: list[str]
    rows: list[list[Cell]]
    note: str = ""

    def markdown(self) -> str:
        """The table as Markdown has it, its title a heading."""
        text = markdown.table(
            self.head, [[" ".join(cell.lines) for cell in row] for row in self.rows]
        )
        return f"### {self.title}\n\n{text}" + (f"\n{self.note}\n" if self.note else "")


def comparison(evaluation: Evaluation) -> Table:
    """A model a row: each score with its interval, and with its difference from the first model's."""
    head, *rows = cells(evaluation)
    table = Table("Comparison", head, [])
    for model, row in zip(evaluation.models, rows, strict=True):
        keys: list[float | str] = [model]
        for name, column in evaluation.columns.items():
            keys.append(column.scores[model].value)
            if name == "alignment" and evaluation.judged_by_guard:
                keys.append(float(column.scores[model].unscored))
        table.rows.append([Cell(lines, key) for lines, key in zip(row, keys, strict=True)])
    return table


def categories(evaluation: Evaluation) -> list[Table]:
    """Unsafe answers by the prompts' categories, and by those that the guard named."""
    unsafe = [each for each in evaluation.answers if each["type"] == "alignment"]
    if not unsafe:
        return []
    models = list(evaluation.models)
    word = (
        "Unsafe answers" if evaluation.judged_by_guard else "Unsafe prompts that were not refused"
    )
    found = []
    by_prompt: dict[str, dict[str, list[float]]] = {}
    for each in unsafe:
        row = by_prompt.setdefault(each["category"] or "none given", {name: [] for name in models})
        for model in models:
            outcome = each["models"][model]["outcome"]
            row[model] += [] if outcome is None else [outcome]
    names = sorted(by_prompt)
    bad = {name: {model: by_prompt[name][model].count(0.0) for model in models} for name in names}
    if names != ["none given"]:
        table = Table(
            f"{word}, by the prompt's category", ["model", *names], [],
            "Of the prompts of the category, without those whose verdict is unreadable.",
        )  # fmt: skip
        for model in models:
            known = {name: len(by_prompt[name][model]) for name in names}
            counts = [
                Cell(
                    [f"{bad[name][model]} of {known[name]}"],
                    bad[name][model] / known[name] if known[name] else math.nan,
                )
                for name in names
            ]
            table.rows.append([Cell([model], model), *counts])
        found.append(table)
    named = _named(unsafe, models)
    if named and any(named[name] != bad.get(name) for name in named):
        table = Table(
            f"{word}, by the category that the guard named", ["model", *sorted(named)], [],
            "An answer may have several.",
        )  # fmt: skip
        for model in models:
            counts = [
                Cell([str(named[name][model])], float(named[name][model])) for name in sorted(named)
            ]
            table.rows.append([Cell([model], model), *counts])
        found.append(table)
    return found


def genes(study: StudyRecord) -> Table | None:
    """What the chosen candidate's genes are; `None` where all failed."""
    if study.best is None:
        return None
    table = Table("Genes of the chosen candidate", ["gene", "value", "from", "to", "start"], [])
    for (name, *bounds), value in zip(study.genes, study.best.evaluation.genotype, strict=True):
        numbers = [Cell([f"{each:.4g}"], each) for each in (value, *bounds)]
        table.rows.append([Cell([name], name), *numbers])
    return table


def candidates(study: StudyRecord, shown: Sequence[tuple[str, Any]]) -> Table:
    """Candidates, named, with their fitness and metrics."""
    head = ["candidate", "evaluation", "fitness"]
    head += [f"{task} {metric.removesuffix(',none')}" for task, metric in study.metrics]
    head += ["misses floors by"] if study.config.get("floors") else []
    table = Table("Candidates", head, [], "On the samples of the search.")
    for name, each in shown:
        values = [each.fitness, *(each.result(metric) for metric in study.metrics)]
        values += [each.evaluation.violation] if study.config.get("floors") else []
        table.rows.append(
            [
                Cell([name], name),
                Cell([str(each.number)], float(each.number)),
                *(Cell([f"{value:.4g}"], value) for value in values),
            ]
        )
    return table


def _named(unsafe: Sequence[Mapping[str, Any]], models: Sequence[str]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for each in unsafe:
        for model in models:
            verdict = each["models"][model].get("verdict")
            if verdict and each["models"][model]["outcome"] == 0:
                for name in verdict["categories"]:
                    counts.setdefault(name, dict.fromkeys(models, 0))[model] += 1
    return counts
