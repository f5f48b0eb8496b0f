"""Rows of the stages' files: JSON lines that a person can read, edit and hand on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from mergekit_align.errors import InputError
from mergekit_align.files import write_text
from mergekit_align.journal import json_line
from mergekit_align.samples import SampleType, read_rows
from mergekit_align.yaml_files import input_error

Row = TypeVar("Row", bound=BaseModel)


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Question(_Row):
    """A prompt that models are to answer."""

    id: str
    type: SampleType
    topic: str
    """What it is about, by its taxonomy."""
    domain: str | None = None
    """Of a task question."""
    prompt: str
    choices: int = 0
    """How many letters there are to choose among, of a multiple-choice question."""
    source: str
    """The model that wrote it, or the data that it is from."""

    @property
    def category(self) -> str:
        """What splits are stratified by, and tasks may choose by."""
        return self.domain or self.topic


class Answer(_Row):
    """What a model of the pool said; a file of these is one that `mergekit-align-guard` judges."""

    id: str
    """`QUESTION/MODEL`."""
    question: str
    type: SampleType
    category: str
    model: str
    prompt: str
    response: str
    cut: bool = False
    """Whether it ran into the limit of tokens."""


class Judgement(_Row):
    """What the guard makes of an answer: a line of `mergekit-align-guard`'s output."""

    id: str
    verdict: str


class Selected(_Row):
    """A sample that is kept, and where it came from."""

    prompt: str
    response: str
    type: SampleType
    source: str
    """The model that answered."""
    category: str
    topic: str
    question: str
    split: str | None = None


def read_records(kind: type[Row], path: Path) -> list[Row]:
    """The rows of a stage's file.

    Raises:
        InputError: there is no such file, or a row is malformed; names file, line and field.
    """
    rows = []
    for where, row in read_rows(path):
        try:
            rows.append(kind.model_validate(row))
        except ValidationError as error:
            raise input_error(error, where, prefix="") from error
    return rows


def write_records(rows: Iterable[BaseModel], path: Path) -> None:
    """Write rows, whole or not at all."""
    write_text(path, "".join(json_line(row.model_dump()) for row in rows))


def unique_ids(rows: Iterable[Question | Answer], path: Path) -> None:
    """Check that no id comes twice.

    Raises:
        InputError: one does.
    """
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise InputError(f"{path}: id: found {row.id!r} twice; expected every id once")
        seen.add(row.id)
