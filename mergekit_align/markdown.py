"""Tables in Markdown, of texts from anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str | Sequence[str]]]) -> str:
    """A line a row; a cell is a text or several, which stand below one another."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(texts: str | Sequence[str]) -> str:
    return "<br>".join(map(_escaped, [texts] if isinstance(texts, str) else texts))


def _escaped(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
