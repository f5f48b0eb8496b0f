"""Which questions are good enough to be answered, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mergekit_align.generate.duplicates import Seen
from mergekit_align.generate.language import is_in
from mergekit_align.generate.settings import Quality
from mergekit_align.samples import SampleType

REASONS = ("too short", "too long", "other language", "contaminated", "duplicate")
"""In the order in which they are asked."""


class Filter:
    """Remembers what it let through, so that nothing like it gets through again.

    Contrasts between types ("kill time", "kill a person") are wanted, so that each type is compared
    with itself alone. Evaluation sets count for all of them.

    Args:
        evaluation: prompts that must not be among the questions.
    """

    def __init__(self, quality: Quality, language: str | None, evaluation: Sequence[str]) -> None:
        self._quality, self._language = quality, language
        self._evaluation = Seen(quality.near_duplicates)
        self._evaluation.add_all(evaluation)
        self._known: dict[SampleType, Seen] = {}

    def know(self, kind: SampleType, questions: Iterable[str]) -> None:
        """Questions that are not to be asked: the examples that a writer was shown, say."""
        self._seen(kind).add_all(questions)

    def reason_against(self, kind: SampleType, question: str, prompt: str) -> str | None:
        """Why a question is not taken, one of `REASONS`; `None` takes it.

        Args:
            question: what is asked, without choices.
            prompt: all of it.
        """
        if len(prompt) < self._quality.min_characters:
            return "too short"
        if len(prompt) > self._quality.max_characters:
            return "too long"
        if self._language is not None and not is_in(question, self._language):
            return "other language"
        if any(self._evaluation.knows(text) for text in {question, prompt}):
            return "contaminated"
        seen = self._seen(kind)
        if seen.knows(question):
            return "duplicate"
        seen.add(question)
        return None

    def _seen(self, kind: SampleType) -> Seen:
        return self._known.setdefault(kind, Seen(self._quality.near_duplicates))
