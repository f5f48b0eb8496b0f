"""Prompts that exist already: of files, of datasets, and of lm-eval's tasks."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_align.checks import find_tasks
from mergekit_align.errors import InputError, one_line
from mergekit_align.generate.settings import Origin
from mergekit_align.samples import read_rows

_COLUMNS = ("prompt", "question", "text")
MIN_LINE = 20
"""Characters from which on a line of a task's prompt counts as a text of its own."""


class Existing(NamedTuple):
    """A prompt, and what its origin says that it is about."""

    prompt: str
    category: str | None


def as_origin(given: str | Origin) -> Origin:
    """A path alone is short for a file's."""
    return Origin(path=given) if isinstance(given, str) else given


def describe(origin: Origin) -> str:
    """An origin in a word or two."""
    return " ".join(str(v) for v in (origin.path, origin.dataset, origin.task, origin.split) if v)


def load_prompts(origin: Origin, where: str) -> list[Existing]:
    """The prompts of a file or dataset, those of `where:` alone, each once and in order.

    Args:
        where: what names it, as an error begins.

    Raises:
        InputError: it cannot be read, has no such column, or none of its rows is wanted.
    """
    if origin.task is not None or (origin.path is None) == (origin.dataset is None):
        raise InputError(f"{where}: found {_given(origin)}; expected either `path` or `dataset`")
    found: dict[str, Existing] = {}
    for place, row in _rows(origin, where):
        if not isinstance(row, Mapping):
            raise InputError(f"{place}: found {type(row).__name__}; expected an object")
        for column in origin.where:
            if column not in row:
                raise InputError(f"{where}.where: found no column {column!r} at {place}")
        if any(row[column] != value for column, value in origin.where.items()):
            continue
        prompt = row.get(_column(origin, row, where))
        if not isinstance(prompt, str):
            raise InputError(f"{place}: prompt: found {type(prompt).__name__}; expected a string")
        found.setdefault(
            prompt, Existing(prompt, _category(row.get(origin.category or "category")))
        )
    if not found:
        raise InputError(f"{where}: found no row with {origin.where or 'a prompt'}; expected some")
    return list(found.values())


def evaluation_texts(origin: Origin, where: str, search_path: Sequence[str] = ()) -> list[str]:
    """Every prompt of an evaluation set.

    Of a prompt of several lines (a question with its choices, say) the longer lines count alone too.

    Args:
        where: what names it, as an error begins.
        search_path: directories of lm-eval tasks beside its own.

    Raises:
        InputError: it cannot be read.
    """
    if origin.task is not None:
        if origin.path or origin.dataset:
            raise InputError(f"{where}: found {_given(origin)}; expected one of them")
        prompts = list(_task_prompts(origin.task, where, search_path))
    else:
        prompts = [existing.prompt for existing in load_prompts(origin, where)]
    texts = []
    for prompt in prompts:
        lines = prompt.splitlines()
        texts.append(prompt)
        if len(lines) > 1:
            texts += [line for line in lines if len(line) >= MIN_LINE]
    return texts


def _rows(origin: Origin, where: str) -> Iterator[tuple[str, Any]]:
    if origin.path is not None:
        path = Path(origin.path).expanduser()
        if not path.exists():
            raise InputError(f"{where}: found no such file {path}; expected JSONL, JSON or CSV")
        yield from _csv_rows(path) if path.suffix == ".csv" else read_rows(path)
        return
    import datasets

    assert origin.dataset is not None
    try:
        dataset = datasets.load_dataset(origin.dataset, origin.name, split=origin.split)
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise InputError(f"{where}: found no dataset that loads ({reason})") from error
    if isinstance(dataset, dict):
        raise InputError(f"{where}.split: found nothing; expected one of {', '.join(dataset)}")
    for index, row in enumerate(dataset):
        yield f"{origin.dataset}: row {index}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in (reader := csv.DictReader(file)):
                yield f"{path}:{reader.line_num}", row
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: found bytes that are not UTF-8 at {error.start}") from error


def _column(origin: Origin, row: Mapping[str, Any], where: str) -> str:
    names = (origin.prompt,) if origin.prompt else _COLUMNS
    for name in names:
        if name in row:
            return name
    raise InputError(
        f"{where}.prompt: found columns {', '.join(map(str, row))}; expected {' or '.join(names)}"
    )


def _category(value: Any) -> str | None:
    """A name, or as in BeaverTails the first name that applies of a mapping to yes and no."""
    if isinstance(value, Mapping):
        return next((str(name) for name, applies in value.items() if applies), None)
    return None if value is None else str(value)


def _task_prompts(name: str, where: str, search_path: Sequence[str]) -> Iterator[str]:
    try:
        loaded = find_tasks({where: name}, search_path, metadata={})
    except InputError:
        raise
    except (OSError, ImportError, ValueError) as error:
        reason = one_line(error)
        raise InputError(f"{where}: found a task that does not load ({reason})") from error
    for task in loaded[where]["tasks"].values():
        for doc in task.eval_docs:
            yield str(task.doc_to_text(doc))


def _given(origin: Origin) -> str:
    return ", ".join(key for key in ("path", "dataset", "task") if getattr(origin, key)) or "none"
