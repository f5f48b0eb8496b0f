"""An evaluation as a table for the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_align import markdown
from mergekit_align.evaluate.scores import Column, Score
from mergekit_align.files import write_text

if TYPE_CHECKING:
    from rich.console import Console


class Evaluation(NamedTuple):
    """What models made of the same prompts and tasks."""

    models: dict[str, str]
    """Directory or hub name of each model, by the name that it has in the table."""
    columns: dict[str, Column]
    """`alignment`, `over_refusal` and `task`, where there are samples for it; lm-eval's tasks."""
    judged_by_guard: bool
    """Whether a guard judged alignment; else it was told by string match."""
    notes: list[str]
    """How each column came about, for a reader; the first is about alignment."""
    settings: dict[str, Any]
    answers: list[dict[str, Any]]
    """A prompt each: `prompt`, `type`, `category`, `expected`, and by model what became of it."""

    def unreadable(self, model: str) -> int | None:
        """Responses to unsafe prompts without a readable verdict; `None` without a guard."""
        return self.columns["alignment"].scores[model].unscored if self.judged_by_guard else None


def print_table(evaluation: Evaluation, console: Console) -> None:
    """Print a model a row, under each score its difference from the first's; then the notes.

    Cells are folded to fit a terminal, and nothing else.
    """
    from rich.measure import Measurement
    from rich.table import Table

    head, *rows = cells(evaluation)
    shown = Table(*head, show_lines=True)
    for row in rows:
        shown.add_row(*("\n".join(lines) for lines in row))
    if not console.is_terminal:
        natural = Measurement.get(console, console.options.update(width=1000), shown).maximum
        console.width = max(console.width, natural)
    console.print(shown)
    for note in evaluation.notes:
        console.print(note, soft_wrap=True, markup=False, highlight=False)


def save(evaluation: Evaluation, stem: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write STEM.json, with every prompt's answers and outcomes, and STEM.md; returns both paths."""
    written = Path(f"{os.fspath(stem)}.json"), Path(f"{os.fspath(stem)}.md")
    for path, text in zip(written, (_json(evaluation), _markdown(evaluation)), strict=True):
        write_text(path, text)
    return written


def _markdown(evaluation: Evaluation) -> str:
    head, *rows = cells(evaluation)
    text = markdown.table(head, rows)
    models = "".join(f"- {name}: `{path}`\n" for name, path in evaluation.models.items())
    settings = ", ".join(f"{key} {value}" for key, value in evaluation.settings.items())
    return f"{text}\n{' '.join(evaluation.notes)}\n\n{models}\nSettings: {settings}.\n"


def cells(evaluation: Evaluation) -> Iterator[list[Any]]:
    """The head, as texts, then a row a model; a cell is its lines: a score, and its difference."""
    head = ["model"]
    for name, column in evaluation.columns.items():
        head.append(
            f"{name.replace('_', '-') if _is_ours(name) else column.title}"
            f"{' %' if column.is_rate else ''}"
        )
        if name == "alignment" and evaluation.judged_by_guard:
            head.append("unreadable")
    yield head
    for model in evaluation.models:
        row = [[model]]
        for name, column in evaluation.columns.items():
            row.append(_lines(column.scores[model], column.is_rate))
            if name == "alignment" and evaluation.judged_by_guard:
                row.append([str(column.scores[model].unscored)])
        yield row


def _is_ours(name: str) -> bool:
    return name in ("alignment", "over_refusal", "task")


def _lines(score: Score, is_rate: bool) -> list[str]:
    scale, digits = (100, 1) if is_rate else (1, 3)

    def show(values: Sequence[float], sign: str = "") -> str:
        if math.isnan(values[0]):
            return "–"
        value, low, high = (f"{scale * each:{sign}.{digits}f}" for each in values)
        return value if math.isnan(values[1]) else f"{value} [{low}, {high}]"

    lines = [show(score[:3])]
    if score.difference is not None:
        lines.append(show(score.difference[:3], "+"))
    return lines


def _json(evaluation: Evaluation) -> str:
    columns = {
        name: {
            "title": column.title,
            "is_rate": column.is_rate,
            "models": {
                model: {
                    **score._asdict(),
                    "difference": score.difference and score.difference._asdict(),
                }
                for model, score in column.scores.items()
            },
            # Those of our own columns are with the answers.
            "outcomes": None if _is_ours(name) else column.outcomes,
        }
        for name, column in evaluation.columns.items()
    }
    content = {
        "models": evaluation.models,
        "judged_by_guard": evaluation.judged_by_guard,
        "notes": evaluation.notes,
        "settings": evaluation.settings,
        "columns": columns,
        "answers": evaluation.answers,
    }
    return json.dumps(_without_nan(content), ensure_ascii=False, indent=1) + "\n"


def _without_nan(value: Any) -> Any:
    """`value` with null for every NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
