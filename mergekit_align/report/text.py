"""Text that others wrote, made fit to be shown: nothing in it is hidden, and nothing acts."""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

MAX_SHOWN = 1500
"""Characters of a prompt or an answer that are shown."""

# They reorder or hide what stands beside them (Unicode Standard Annex 9).
_UNSEEN = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C, 0x200B, 0xFEFF}


class Shown(NamedTuple):
    """A text, or its beginning."""

    text: str
    cut_from: int | None
    """Characters of the whole text, where this is only its beginning."""


def visible(text: str) -> str:
    """`text` with a visible sign for every character that has none: control, surrogate, direction."""
    if text.isprintable():
        return text
    return "".join(_sign(character) for character in text.replace("\r\n", "\n"))


def shown(text: str, limit: int = MAX_SHOWN) -> Shown:
    """The first `limit` characters of a text, made visible."""
    if len(text) <= limit:
        return Shown(visible(text), None)
    return Shown(visible(text[:limit]), len(text))


def brief(text: str, limit: int = 28) -> str:
    """A name for a figure: one line, no longer than `limit`."""
    line = " ".join(visible(text).split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def _sign(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return character
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's control pictures
    if code == 0x7F:
        return "\u2421"
    if code in _UNSEEN or unicodedata.category(character) in ("Cc", "Cs", "Cn"):
        return f"⟨U+{code:04X}⟩"
    return character
