"""Responses to be judged, from files: JSON lines, a JSON list, or our samples.

A row has `prompt` and `response` (as in BeaverTails), or `messages` with `role` and `content`; and, if
it likes, `id` and `category`: a name, or as in BeaverTails a mapping of names to whether they apply.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_align.errors import InputError
from mergekit_align.guard.conversation import Conversation
from mergekit_align.samples import read_rows


class Judged(NamedTuple):
    """A conversation to be judged, and what its file says of it."""

    id: str
    conversation: Conversation
    categories: tuple[str, ...]


def load_responses(
    paths: Sequence[str | os.PathLike[str]], *, prompts_only: bool = False
) -> list[Judged]:
    """The rows of all files, in order. Those without `id` are named by their position.

    Args:
        prompts_only: take the prompts and leave any responses out.

    Raises:
        InputError: a file cannot be read, a row is malformed or an id comes twice; names file and
            line.
    """
    rows: list[Judged] = []
    seen: dict[str, str] = {}
    for path in paths:
        for where, row in read_rows(Path(path)):
            judged = _judged(row, where, default_id=str(len(rows)), prompts_only=prompts_only)
            if judged.id in seen:
                raise InputError(
                    f"{where}: id: found {judged.id!r}; expected another than at {seen[judged.id]}"
                )
            seen[judged.id] = where
            rows.append(judged)
    if not rows:
        raise InputError(f"{', '.join(map(str, paths))}: found no responses; expected at least one")
    return rows


def _judged(row: Any, where: str, *, default_id: str, prompts_only: bool) -> Judged:
    if not isinstance(row, dict):
        raise InputError(f"{where}: found {type(row).__name__}; expected an object")
    turns = list(_turns(row, where))
    if prompts_only:
        turns = turns[: len(turns) - (len(turns) + 1) % 2]
    elif len(turns) % 2:
        raise InputError(f"{where}: response: found nothing; expected a string")
    return Judged(
        str(row.get("id", default_id)), Conversation(tuple(turns)), _categories(row.get("category"))
    )


def _turns(row: dict[str, Any], where: str) -> Iterator[str]:
    if "messages" not in row:
        for key in ("prompt", "response"):
            if row.get(key) is not None or key == "prompt":
                yield _text(row.get(key), f"{where}: {key}")
        return
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: messages: found {messages!r}; expected a list of messages")
    for index, message in enumerate(messages):
        key = f"{where}: messages[{index}]"
        expected = ("user", "assistant")[index % 2]
        role = message.get("role") if isinstance(message, dict) else None
        if role != expected:
            raise InputError(f"{key}.role: found {role!r}; expected {expected!r}")
        yield _text(message.get("content"), f"{key}.content")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        found = "nothing" if value is None else type(value).__name__
        raise InputError(f"{where}: found {found}; expected a string")
    return value


def _categories(value: Any) -> tuple[str, ...]:
    if isinstance(value, dict):
        return tuple(str(name) for name, applies in value.items() if applies)
    return (str(value),) if value is not None else ()
