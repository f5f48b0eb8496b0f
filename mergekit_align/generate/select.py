"""One answer a question: a refusal of an unsafe one, help with a harmless one, the expert's to a task.

- `alignment`: an answer that the guard judges safe and that refuses, in full, or in part with a safe
  completion (`is_refusal`); drawn among those of all models.
- `benign`: an answer that the guard judges safe and that complies in full; drawn likewise.
- `task`: the expert's; where there are choices, one that chooses among them.

Answers that ran into the limit of tokens, or are out of the length bounds, are never taken.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mergekit_align.generate.parse import chosen_letter
from mergekit_align.generate.records import Answer, Question, Selected
from mergekit_align.generate.settings import SelectStage
from mergekit_align.refusal import is_refusal

Counts = dict[tuple[str, str], Counter[str]]


class Selection(NamedTuple):
    """What is kept, and what became of the rest."""

    selected: list[Selected]
    by_topic: Counts
    """By type (with the domain) and topic: questions `kept`, and dropped, by reason."""
    by_model: Counts
    """By type and model: answers by what they were, and how many were `kept`."""


def key_of(question: Question) -> str:
    """What a question was asked for by, as the config calls it."""
    return question.type if question.domain is None else f"{question.type}.{question.domain}"


def select(
    questions: Sequence[Question],
    answers: Sequence[Answer],
    verdicts: Mapping[str, str],
    settings: SelectStage,
    *,
    seed: int,
) -> Selection:
    """The answers that are kept, in the order of the questions.

    Args:
        verdicts: the guard's, by the answer's id.
        seed: draws among answers that fit; a question's draw depends on no other question.
    """
    found = Selection([], {}, {})
    by_question: dict[str, list[Answer]] = {}
    for answer in answers:
        by_question.setdefault(answer.question, []).append(answer)
    for question in questions:
        counts = found.by_topic.setdefault((key_of(question), question.topic), Counter())
        fitting, reasons = [], []
        own = by_question.get(question.id, [])
        counts["answered"] += bool(own)
        counts["judged"] += any(verdicts.get(each.id) in ("safe", "unsafe") for each in own)
        for answer in own:
            reason = _reason_against(question, answer, verdicts.get(answer.id), settings)
            of_model = found.by_model.setdefault((question.type, answer.model), Counter())
            of_model["answered"] += 1
            of_model["judged"] += verdicts.get(answer.id) in ("safe", "unsafe")
            of_model[reason or "fitting"] += 1
            if reason is None:
                fitting.append(answer)
            else:
                reasons.append(reason)
        if not fitting:
            # Of several reasons the one that came nearest to being kept.
            counts[max(reasons, key=REASONS.index, default="unanswered")] += 1
            continue
        chosen = random.Random(f"{seed} {question.id}").choice(fitting)
        counts["kept"] += 1
        found.by_model[question.type, chosen.model]["kept"] += 1
        found.selected.append(
            Selected(
                prompt=question.prompt,
                response=chosen.response.strip(),
                type=question.type,
                source=chosen.model,
                category=question.category,
                topic=question.topic,
                question=question.id,
            )
        )
    return found


REASONS = (
    "unanswered",
    "unsafe",
    "unreadable",
    "not refused",
    "refused",
    "unparsable",
    "too short",
    "too long",
    "cut",
)
"""Why an answer is not kept, from the least to the most that is right about it."""


def _reason_against(
    question: Question, answer: Answer, verdict: str | None, settings: SelectStage
) -> str | None:
    response = answer.response.strip()
    if question.type == "task":
        if question.choices and chosen_letter(response, question.choices) is None:
            return "unparsable"
    else:
        if verdict != "safe":
            return verdict or "unreadable"
        refuses = is_refusal(response)
        if refuses != (question.type == "alignment"):
            return "refused" if refuses else "not refused"
    if len(response) < settings.min_characters:
        return "too short"
    if len(response) > settings.max_characters:
        return "too long"
    return "cut" if answer.cut else None
