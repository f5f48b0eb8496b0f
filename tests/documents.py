"""What README and docs show: blocks of commands, configs and Python, found and told apart."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import yaml
from commands import ROOT, SCRIPTS
from markdown_it import MarkdownIt

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
PROGRAMS = {*SCRIPTS, "accelerate", "grep", "lm_eval", "make", "pip", "python", "ray"}


class Block(NamedTuple):
    """A fenced or an indented block."""

    page: Path
    line: int
    language: str
    """`sh`, `yaml`, `python`, `json`, or `text`."""
    text: str
    title: str | None
    """The file that the reader is to write."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[str]:
        """Its commands, each in one line."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line.strip() for line in lines if shlex.split(line, comments=True)]


def blocks(page: Path) -> list[Block]:
    found = []
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type not in ("fence", "code_block"):
            continue
        assert token.map is not None
        title = re.search('title="([^"]+)"', token.info)
        language = token.info.split()[0] if token.info else _guess(token.content)
        found.append(
            Block(page, token.map[0] + 1, language, token.content, title and title.group(1))
        )
    return found


def _guess(text: str) -> str:
    """The language of a block that does not say."""
    words = text.split()
    if words[0] in PROGRAMS:
        return "sh"
    if words[0] in ("from", "import"):
        return "python"
    try:
        content = yaml.safe_load(re.sub("!function ", "", text))
    except yaml.YAMLError:
        return "text"
    return "yaml" if isinstance(content, dict) and "\n" in text.strip() else "text"


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub and the site have it."""
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def anchors(page: Path) -> set[str]:
    """Of a page's own headings."""
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    following = itertools.pairwise(tokens)
    return {slug(inline.content) for token, inline in following if token.type == "heading_open"}
