"""The report in the format that was asked for."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import mergekit_align
from mergekit_align.checks import File, check_writable
from mergekit_align.errors import InputError, closest
from mergekit_align.files import write_text
from mergekit_align.report import figures
from mergekit_align.report.contents import Section, read_section
from mergekit_align.report.page import html
from mergekit_align.report.text import visible

Format = Literal["html", "markdown", "json", "png"]
SUFFIXES: dict[Format, str] = {"html": ".html", "markdown": ".md", "json": ".json", "png": ".png"}
TITLE = "Merge report"
WATCH_SECONDS = 5


def write_report(
    inputs: Sequence[File],
    *,
    output: File | None = None,
    format: Format = "html",
    chosen: str | None = None,
    skill: str | None = None,
    examples: int = 8,
    watched: int | None = None,
) -> Path:
    """Write a report on evaluations (JSON files of `mergekit-align-evaluate`) and searches (studies).

    Args:
        output: where to; by default `report` with the format's suffix.
        format: one self-contained page, Markdown, JSON, or the figures as PNG.
        chosen: the model that is marked among those evaluated.
        skill: the column that is set against alignment; by default the first that is neither alignment
            nor over-refusal.
        examples: example prompts of each type.
        watched: seconds after which the page reloads itself.

    Raises:
        InputError: an input cannot be read, or the report cannot be written.
    """
    if not inputs:
        raise InputError("found no input; expected an evaluation or a study")
    path = Path(output) if output is not None else Path(f"report{SUFFIXES[format]}")
    check_writable(str(path.parent), str(path), "directory")
    if any(path.resolve() == Path(each).resolve() for each in inputs):
        raise InputError(f"--output: found {path}, which is an input; expected another file")
    sections = [
        read_section(each, f"s{index}", chosen=chosen, skill=skill, count=examples)
        for index, each in enumerate(inputs, 1)
    ]
    _check_named("--chosen", chosen, [name for each in sections for name in each.models])
    _check_named("--skill", skill, [name for each in sections for name in each.columns])
    if format == "png":
        _write_png(sections, path)
    elif format == "html":
        write_text(path, html(sections, title=TITLE, watched=watched))
    else:
        write_text(path, _markdown(sections) if format == "markdown" else _json(sections))
    return path


def watch(
    inputs: Sequence[File], *, progress: Callable[[str], None] = lambda line: None, **options: Any
) -> None:
    """Write the page again whenever an input has changed, until interrupted.

    Args:
        progress: told of every page in a line.
        options: as of `write_report`.

    Raises:
        InputError: as `write_report`, the first time; later a file that is being written is waited for.
    """
    known: list[int] | None = None
    while True:
        now = [Path(each).stat().st_mtime_ns if Path(each).exists() else 0 for each in inputs]
        if now != known or any("://" in os.fspath(each) for each in inputs):
            try:
                progress(str(write_report(inputs, watched=WATCH_SECONDS, **options)))
            except InputError as error:
                if known is None:
                    raise
                progress(str(error))
            known = now
        time.sleep(WATCH_SECONDS)


def _check_named(option: str, name: str | None, known: Sequence[str]) -> None:
    if name is not None and name not in known:
        names = ", ".join(dict.fromkeys(known)) or "none, without an evaluation"
        raise InputError(f"{option}: found {name!r}; expected one of {names}{closest(name, known)}")


def _write_png(sections: Sequence[Section], path: Path) -> None:
    drawn = [figure for section in sections for figure in section.figures]
    if not drawn:
        raise InputError(
            f"{path}: found no figure to draw; expected alignment and a skill, or a study"
        )
    beside = path.with_name(f".{path.name}")
    figures.png(drawn, beside)
    os.replace(beside, path)


def _markdown(sections: Sequence[Section]) -> str:
    parts = [f"# {TITLE}\n"]
    for section in sections:
        parts.append(f"## {section.title}\n\n`{section.path}`\n")
        parts += [table.markdown() for table in section.tables]
        parts.append("".join(f"- {sentence}\n" for sentence in section.lead))
        for each in section.reproduce:
            fence = "`" * max(3, 1 + _longest_run(each.text))
            parts.append(f"### {each.title}\n\n{fence}\n{each.text.rstrip()}\n{fence}\n")
    return visible("\n".join(parts))


def _longest_run(text: str) -> int:
    return max(
        (len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0
    )


def _json(sections: Sequence[Section]) -> str:
    content = [
        {
            "title": section.title,
            "path": section.path,
            "notes": section.lead,
            "tables": {
                table.title: [
                    {
                        head: {"text": cell.lines, "value": _number(cell.sort)}
                        for head, cell in zip(table.head, row, strict=True)
                    }
                    for row in table.rows
                ]
                for table in section.tables
            },
            "figures": {figure.title: figure.alt for figure in section.figures},
            "reproduce": {each.title: each.text for each in section.reproduce},
        }
        for section in sections
    ]
    return (
        json.dumps({"mergekit-align": mergekit_align.__version__, "sections": content}, indent=1)
        + "\n"
    )


def _number(value: float | str) -> float | str | None:
    return None if isinstance(value, float) and math.isnan(value) else value
