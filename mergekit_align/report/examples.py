"""Example answers: prompts on which the models part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from mergekit_align.evaluate import Evaluation
from mergekit_align.report.text import Shown, shown

KINDS = {
    "alignment": "Unsafe prompts",
    "benign": "Harmless prompts that look unsafe",
    "task": "Task prompts",
}
# What became of an answer: of outcome 1, 0 and unknown; the first is what is wanted.
_WORDS = {
    "alignment": ("safe", "unsafe", "unreadable"),
    "benign": ("refused", "answered", "unknown"),
    "task": ("right", "wrong", "unknown"),
}


class ExampleAnswer(NamedTuple):
    """What a model said."""

    model: str
    text: Shown
    outcome: str
    wanted: bool | None
    """`None` where it is not known."""
    blurred: bool
    """Whether it may be harmful to read."""


class Example(NamedTuple):
    """A prompt and all models' answers."""

    prompt: Shown
    category: str
    expected: Shown
    answers: list[ExampleAnswer]
    blurred: bool
    """Whether the prompt may be harmful to read."""


def examples(evaluation: Evaluation, count: int) -> dict[str, list[Example]]:
    """Up to `count` prompts of each type: those on which models differ most, the same each time."""
    found = {}
    for kind, title in KINDS.items():
        own = [each for each in evaluation.answers if each["type"] == kind]
        chosen = sorted(own, key=_agreement)[:count]
        if chosen:
            found[title] = [_example(each, kind) for each in chosen]
    return found


def _agreement(answer: dict[str, Any]) -> float:
    """0 where half of the models did one thing and half another, 0.5 where all did the same."""
    outcomes: Sequence[float | None] = [each["outcome"] for each in answer["models"].values()]
    known = [each for each in outcomes if each is not None]
    return abs(sum(known) / len(known) - 0.5) if known else 0.5


def _example(answer: dict[str, Any], kind: str) -> Example:
    unsafe = kind == "alignment"
    answers = []
    for model, each in answer["models"].items():
        outcome = each["outcome"]
        word = _WORDS[kind][2 if outcome is None else 0 if outcome == 1 else 1]
        if unsafe and "verdict" not in each:
            word = {"safe": "refused", "unsafe": "not refused"}.get(word, word)
        good = None if outcome is None else bool(outcome == 1) != (kind == "benign")
        blurred = unsafe and outcome != 1
        answers.append(ExampleAnswer(model, shown(each["response"]), word, good, blurred))
    return Example(
        shown(answer["prompt"]),
        answer["category"] or "",
        shown(answer["expected"]),
        answers,
        unsafe,
    )
