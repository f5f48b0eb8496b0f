"""Which answer of which model becomes a sample, and why the others do not."""

from __future__ import annotations

from collections import Counter

import pytest

from mergekit_align.generate.records import Answer, Question
from mergekit_align.generate.select import Selection, select
from mergekit_align.generate.settings import SelectStage
from mergekit_align.samples import SampleType

REFUSAL, HELP = "Sorry, I cannot help with that.", "Take some flour and water."


def question(kind: SampleType, number: int = 0, choices: int = 0) -> Question:
    return Question(
        id=f"{kind}-{number}",
        type=kind,
        topic="bread",
        domain="baking" if kind == "task" else None,
        prompt=f"How is bread number {number} made?",
        choices=choices,
        source="writer",
    )


def answer(asked: Question, model: str, response: str, *, cut: bool = False) -> Answer:
    return Answer(
        id=f"{asked.id}/{model}",
        question=asked.id,
        type=asked.type,
        category=asked.category,
        model=model,
        prompt=asked.prompt,
        response=response,
        cut=cut,
    )


def chosen(asked: Question, said: list[tuple[str, str]], **settings: int) -> Selection:
    """Of answers and their verdicts, by models a, b, ..."""
    answers = [answer(asked, name, text) for name, (text, _) in zip("abc", said, strict=False)]
    verdicts = {each.id: verdict for each, (_, verdict) in zip(answers, said, strict=True)}
    return select([asked], answers, verdicts, SelectStage(**settings), seed=0)


@pytest.mark.parametrize(
    ("kind", "said", "model", "reason"),
    [
        ("alignment", [(HELP, "unsafe"), (REFUSAL, "safe")], "b", None),
        ("alignment", [(HELP, "unsafe"), (REFUSAL, "unsafe")], None, "unsafe"),
        ("alignment", [(HELP, "safe"), (REFUSAL, "unsafe")], None, "not refused"),
        ("alignment", [(REFUSAL, "unreadable"), (HELP, "unsafe")], None, "unreadable"),
        ("alignment", [(f"{REFUSAL} However, you can buy some. 1. Go out.", "safe")], "a", None),
        ("benign", [(REFUSAL, "safe"), (HELP, "safe")], "b", None),
        ("benign", [(REFUSAL, "safe"), (HELP, "unsafe")], None, "refused"),
        ("task", [(HELP, "unsafe")], "a", None),
        ("alignment", [], None, "unanswered"),
    ],
)
def test_what_is_kept(
    kind: SampleType, said: list[tuple[str, str]], model: str | None, reason: str | None
) -> None:
    found = chosen(question(kind), said)
    assert [row.source for row in found.selected] == ([model] if model else [])
    (counts,) = found.by_topic.values()
    assert counts["kept"] == len(found.selected)
    if reason:
        assert counts[reason] == 1


def test_a_choice_must_be_one() -> None:
    assert chosen(question("task", choices=4), [("The answer is B.", "")]).selected
    found = chosen(question("task", choices=4), [("Take the second.", "")])
    assert found.by_topic["task.baking", "bread"]["unparsable"] == 1


def test_answers_out_of_bounds_or_cut_are_dropped() -> None:
    asked = question("benign")
    assert not chosen(asked, [(HELP, "safe")], max_characters=10).selected
    assert not chosen(asked, [(HELP, "safe")], min_characters=100).selected
    cut = answer(asked, "a", HELP, cut=True)
    assert not select([asked], [cut], {cut.id: "safe"}, SelectStage(), seed=0).selected


def test_refusals_are_drawn_alike_and_by_the_seed() -> None:
    asked = [question("alignment", number) for number in range(300)]
    answers = [answer(each, model, REFUSAL) for each in asked for model in "abc"]
    verdicts = {each.id: "safe" for each in answers}

    def models(seed: int, questions: list[Question]) -> list[str]:
        found = select(questions, answers, verdicts, SelectStage(), seed=seed).selected
        return [row.source for row in found]

    drawn = models(0, asked)
    assert all(70 < count < 130 for count in Counter(drawn).values())
    assert drawn == models(0, asked)
    assert drawn != models(1, asked)
    # A question that goes away changes no other's draw.
    assert models(0, asked[1:]) == drawn[1:]
