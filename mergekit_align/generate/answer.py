"""The second stage: every model of the pool answers; a domain's questions, its expert alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mergekit_align.errors import InputError
from mergekit_align.generate.config import Config
from mergekit_align.generate.records import Answer, Question
from mergekit_align.generate.work import Worker


def answer(
    config: Config,
    questions: Sequence[Question],
    worker: Worker,
    progress: Callable[[str], None],
) -> list[Answer]:
    """Answers in the order of the questions, and for each in the order of the pool.

    Raises:
        InputError: a question is of a domain that the config does not know.
    """
    experts = {asked.domain: asked.expert for asked in config.asked if asked.domain}
    for question in questions:
        if question.type == "task" and question.domain not in experts:
            raise InputError(
                f"{config.output}/questions.jsonl: {question.id}: domain: found "
                f"{question.domain!r}; expected one of {', '.join(map(str, experts))}"
            )
    found: dict[tuple[str, str], Answer] = {}
    for model in config.pool:
        own = [
            question
            for question in questions
            if question.type != "task" or experts[str(question.domain)] == model.name
        ]
        before = worker.computed
        replies = worker.replies(
            model,
            [[{"role": "user", "content": question.prompt}] for question in own],
            config.settings.answers,
            key=model.name,
            seed=config.seed(config.settings.answers.seed),
        )
        for question, reply in zip(own, replies, strict=True):
            found[question.id, model.name] = Answer(
                id=f"{question.id}/{model.name}",
                question=question.id,
                type=question.type,
                category=question.category,
                model=model.name,
                prompt=question.prompt,
                response=reply.text,
                cut=reply.cut,
            )
        progress(f"answers: {model.name}: {len(own)}, of them {worker.computed - before} new here")
    worker.close()
    return [
        found[question.id, model.name]
        for question in questions
        for model in config.pool
        if (question.id, model.name) in found
    ]
