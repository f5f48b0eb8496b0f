"""Questions out of what a model wrote: the parsers that a template can name."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from pydantic import model_validator

from mergekit_align.generate.settings import Strict

LETTERS = "ABCDEFGHIJ"
_ITEM = re.compile(r"^\s*(?:[-*\u2022]|\(?\d{1,3}[.):]|(?:Question|Q)\s*\d*\s*:)\s*", re.IGNORECASE)
_QUOTES = "\"'\u201c\u201d\u2018\u2019\u00ab\u00bb "
_OPTION = re.compile(r"^\s*\(?([A-J])[.):]\s*(\S.*?)\s*$")
_ANSWER = re.compile(r"^\s*(?:the\s+)?(?:correct\s+)?answer\b", re.IGNORECASE)
_CHOSEN = (
    # "Answer: (B)", "the correct option is B": in any place, the last one counts.
    re.compile(
        r"\b(?:[Aa]nswer|ANSWER|[Oo]ption|[Cc]hoice)\b[^A-Za-z\n]*(?:is|:)?[\s:*(\"']*([A-J])\b(?![a-z'])"
    ),
    # "B", "(B)", "B. text", "**B**": at the beginning.
    re.compile(r"^[\s*(\"']*([A-J])(?:[*).:,\"']|\s*$)"),
)


class Parsed(NamedTuple):
    """A question as it was written."""

    question: str
    choices: tuple[str, ...] = ()
    """The texts to choose among, of a multiple-choice question."""


class Parser(Strict):
    """How a template's answer is read."""

    kind: Literal["whole", "lines", "pattern", "multiple_choice"]
    """`whole`: all of it is one question. `lines`: one a line, of a list its items alone. `pattern`:
    wherever a regular expression finds its group `question`. `multiple_choice`: a question with lines
    `A.` to `D.` below it; a line with the answer is left out."""
    pattern: str | None = None

    @model_validator(mode="after")
    def _has_its_pattern(self) -> Parser:
        if (self.kind == "pattern") != (self.pattern is not None):
            raise ValueError("`pattern` with kind `pattern`, and with no other")
        if self.pattern is not None:
            try:
                groups = re.compile(self.pattern).groupindex
            except re.error as error:
                raise ValueError(f"a regular expression ({error})") from error
            if "question" not in groups:
                raise ValueError("a regular expression with a group (?P<question>...)")
        return self

    def parse(self, text: str, *, cut: bool = False) -> list[Parsed]:
        """The questions in a model's answer; of one that was `cut`, those that ended before."""
        match self.kind:
            case "whole":
                return [] if cut else _questions([text])
            case "lines":
                lines = [line for line in text.splitlines() if line.strip()]
                lines = lines[:-1] if cut else lines
                # In a list what stands around it ("Here are five questions:") is none.
                return _questions([line for line in lines if _ITEM.match(line)] or lines)
            case "pattern":
                found = re.finditer(self.pattern or "", text, re.MULTILINE)
                questions = [match["question"] or "" for match in found]
                return _questions(questions[:-1] if cut else questions)
            case "multiple_choice":
                blocks = _blocks(text)
                return blocks[:-1] if cut else blocks


def _questions(texts: list[str]) -> list[Parsed]:
    stripped = (_ITEM.sub("", text, count=1).strip(_QUOTES).strip() for text in texts)
    return [Parsed(text) for text in stripped if text]


def _blocks(text: str) -> list[Parsed]:
    """Multiple-choice questions: lines of a question, then its options in the order of letters."""
    found: list[Parsed] = []
    question: list[str] = []
    choices: list[str] = []

    def finish() -> None:
        if question and len(choices) >= 2 and len(set(choices)) == len(choices):
            stem = _ITEM.sub("", " ".join(question), count=1).strip(_QUOTES)
            found.append(Parsed(stem, tuple(choices)))
        question.clear()
        choices.clear()

    for line in text.splitlines():
        option = _OPTION.match(line)
        if option and question and LETTERS.find(option[1]) == len(choices):
            choices.append(option[2])
        elif _ANSWER.match(line) or not line.strip():
            if choices:
                finish()
        else:
            if choices:
                finish()
            question.append(line.strip())
    finish()
    return found


def chosen_letter(answer: str, letters: int) -> str | None:
    """The letter that an answer to a multiple-choice question chooses; `None` where it has none.

    Args:
        letters: how many there are to choose among.
    """
    for pattern in _CHOSEN:
        chosen = [letter for letter in pattern.findall(answer) if letter in LETTERS[:letters]]
        if chosen:
            return str(chosen[-1])
    return None
