"""Finished work on disk, so that a killed run does none of it again, and processes can share it out.

A piece of work (a chunk) has a key, and becomes a line of a journal beside the output. Each process
appends to a journal of its own (`OUTPUT.partial-RANK`) and reads everyone's. A last line that was cut
off by a kill is dropped.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mergekit_align.errors import InputError

Key = int | str


class Journal:
    """The chunks of one run.

    Args:
        output: what the chunks are for; journals lie beside it.
        fingerprint: of all that a chunk depends on.
        rank: of this process.
        holds: what a journal of another run is called in the error, and what makes it another.
    """

    def __init__(self, output: Path, fingerprint: str, rank: int, *, holds: str) -> None:
        self._output = output
        self._fingerprint = fingerprint
        self._holds = holds
        self._own = output.with_name(f"{output.name}.partial-{rank}")

    def chunks(self) -> dict[Key, list[Any]]:
        """The records of every finished chunk, whoever computed it.

        Raises:
            InputError: a journal belongs to another run.
        """
        found: dict[Key, list[Any]] = {}
        for path in journal_files(self._output):
            lines = map(json.loads, _raw_lines(path))
            header = next(lines, None)
            if header is not None and header != {"run": self._fingerprint}:
                raise InputError(
                    f"{path}: found {self._holds}; expected this one's: delete it, or name another "
                    "output"
                )
            found.update((line["chunk"], line["records"]) for line in lines)
        return found

    def append(self, key: Key, records: Sequence[Any]) -> None:
        """Add a finished chunk; it is on disk when this returns."""
        if not self._own.exists():
            self._own.touch()
        whole = sum(len(line) for line in _raw_lines(self._own))
        with self._own.open("r+b") as file:
            file.truncate(whole)
            file.seek(whole)
            if not whole:
                file.write(json_line({"run": self._fingerprint}).encode())
            file.write(json_line({"chunk": key, "records": list(records)}).encode())
            file.flush()
            os.fsync(file.fileno())

    def delete(self) -> None:
        """Remove every process's journal."""
        delete_journals(self._output)


def journal_files(output: Path) -> list[Path]:
    """The journals beside an output."""
    return sorted(output.parent.glob(f"{glob.escape(output.name)}.partial-*"))


def delete_journals(output: Path) -> None:
    """Remove the journals beside an output."""
    for path in journal_files(output):
        path.unlink()


def json_line(content: dict[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(content, ensure_ascii=False) + "\n"


def _raw_lines(path: Path) -> Iterator[bytes]:
    """The lines of a journal, but for a last one that was cut off."""
    with path.open("rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))
