"""What became of everything: from what was asked for to what is kept, by topic and by model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_align.generate.filter import REASONS as AGAINST_QUESTIONS
from mergekit_align.generate.select import REASONS as AGAINST_ANSWERS
from mergekit_align.generate.settings import Stage

if TYPE_CHECKING:
    from rich.console import Console


class Row(NamedTuple):
    """What became of the questions of one topic, or of one model's answers."""

    of: str
    """What the config asks for (`alignment`, `task.DOMAIN`); of a model, the type of the questions."""
    name: str
    """The topic, `all` for the sum of several; or the model."""
    counts: dict[str, int]
    dropped: dict[str, int]
    """By reason."""


class Funnel(NamedTuple):
    """From what was asked for to what is kept."""

    topics: list[Row]
    """Questions asked for; parsed; good enough and unlike the others (`questions`); answered; with a
    readable verdict (`judged`); and kept."""
    models: list[Row]
    """Answers; with a readable verdict; that could be kept (`fitting`); and kept."""


TOPIC_COLUMNS = ("asked", "parsed", "questions", "answered", "judged", "kept")
MODEL_COLUMNS = ("answered", "judged", "fitting", "kept")
_AGAINST = ("writer refused", *AGAINST_QUESTIONS, "surplus", *AGAINST_ANSWERS)


def make_funnel(stages: Mapping[Stage, Mapping[str, Any]]) -> Funnel:
    """The funnel of what the stages counted; what has not run is 0."""
    questions = stages["questions"].get("topics", {})
    answers = stages["select"].get("topics", {})
    rows = []
    for key in [*questions, *(key for key in answers if key not in questions)]:
        own, later = questions.get(key, {}), answers.get(key, {})
        topics = [*own, *(topic for topic in later if topic not in own)]
        parts = [
            _topic_row(key, topic, own.get(topic, {}), later.get(topic, {})) for topic in topics
        ]
        rows += parts if len(parts) == 1 else [*parts, _sum(key, parts)]
    models = [
        Row(kind, model, {name: own.get(name, 0) for name in MODEL_COLUMNS}, _dropped(own))
        for kind, found in stages["select"].get("models", {}).items()
        for model, own in found.items()
    ]
    return Funnel(rows, models)


def _topic_row(key: str, topic: str, asked: Mapping[str, int], later: Mapping[str, int]) -> Row:
    counts = {
        **{name: asked.get(name, 0) for name in ("asked", "parsed")},
        "questions": asked.get("kept", 0),
        **{name: later.get(name, 0) for name in ("answered", "judged", "kept")},
    }
    return Row(key, topic, counts, _dropped(asked) | _dropped(later))


def _dropped(counts: Mapping[str, int]) -> dict[str, int]:
    return {reason: counts[reason] for reason in _AGAINST if counts.get(reason)}


def _sum(key: str, rows: list[Row]) -> Row:
    return Row(
        key,
        "all",
        {name: sum(row.counts[name] for row in rows) for name in TOPIC_COLUMNS},
        _dropped({name: sum(row.dropped.get(name, 0) for row in rows) for name in _AGAINST}),
    )


def tables(funnel: Funnel) -> list[tuple[list[str], list[list[str]]]]:
    """The funnel as two tables of text: headers and rows, by topic and by model."""

    def lines(rows: list[Row]) -> list[list[str]]:
        return [
            [row.of, row.name, *map(str, row.counts.values()), _reasons(row.dropped)]
            for row in rows
        ]

    return [
        (["questions of", "topic", *TOPIC_COLUMNS, "dropped"], lines(funnel.topics)),
        (["answers to", "model", *MODEL_COLUMNS, "dropped"], lines(funnel.models)),
    ]


def _reasons(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items())


def print_funnel(funnel: Funnel, console: Console) -> None:
    """Both tables on a terminal, each with what was dropped below it."""
    from rich.table import Column, Table

    for (headers, lines), rows in zip(tables(funnel), funnel, strict=True):
        if not rows:
            continue
        names = [Column(header, overflow="fold") for header in headers[:2]]
        numbers = [Column(header, justify="right", no_wrap=True) for header in headers[2:-1]]
        table = Table(*names, *numbers)
        for line in lines:
            table.add_row(*line[:-1])
        console.print(table)
        whole = [row for row in rows if row.name == "all"]
        for row in [*whole, *(row for row in rows if row.of not in {each.of for each in whole})]:
            if row.dropped:
                name = "" if row.name == "all" else f", {row.name}"
                console.print(f"  {row.of}{name}: dropped {_reasons(row.dropped)}")
