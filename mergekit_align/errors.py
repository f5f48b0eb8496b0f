"""What a user got wrong, as opposed to a bug of ours: printed as one line, without a traceback."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable


class InputError(ValueError):
    """Something that the user gave cannot be used; commands print it and exit with status 2."""

    @classmethod
    def at(
        cls, file: str | os.PathLike[str], key: str, *, found: object, expected: str
    ) -> InputError:
        """An error that says where it is (`file`, `key`), what was found and what was expected."""
        return cls(f"{os.fspath(file)}: {key}: found {found}; expected {expected}")


def closest(name: str, known: Iterable[str]) -> str:
    """The end of an "expected" clause: ` (did you mean ...?)` for the known name nearest to `name`."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def one_line(error: object, limit: int = 200) -> str:
    """What an error says, shortened, as a part of our own line."""
    return " ".join(str(error).split())[:limit]
