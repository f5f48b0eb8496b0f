"""The stages: each reads the files of earlier ones and writes its own.

A stage is a method that does its work, in every process, and returns what is left for the first process
alone: to write the output. That returns the stage's counts.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from mergekit_align.files import write_text
from mergekit_align.generate.answer import answer
from mergekit_align.generate.ask import ask
from mergekit_align.generate.card import card
from mergekit_align.generate.config import Config
from mergekit_align.generate.funnel import make_funnel
from mergekit_align.generate.record import Record
from mergekit_align.generate.records import (
    Answer,
    Judgement,
    Question,
    Selected,
    read_records,
    unique_ids,
    write_records,
)
from mergekit_align.generate.select import select
from mergekit_align.generate.settings import STAGES, Stage
from mergekit_align.generate.work import Worker
from mergekit_align.guard import Conversation
from mergekit_align.guard.responses import Judged
from mergekit_align.guard.run import judge_rows
from mergekit_align.journal import Journal, delete_journals
from mergekit_align.samples import Sample, save_samples, split_samples


class Stages:
    """The stages of one run; every process has them, and the first one writes.

    Args:
        config: what is to be generated.
        record: of what is done.
        state: accelerate's `PartialState`.
        progress: told of each step in a line.
    """

    def __init__(
        self, config: Config, record: Record, state: Any, progress: Callable[[str], None]
    ) -> None:
        self._config, self._record = config, record
        self._state, self._progress = state, progress

    def run(self, stage: Stage) -> None:
        """Run one stage and write down that it is done."""
        started = time.monotonic()
        work = {
            "questions": self._questions,
            "answers": self._answers,
            "judge": self._judge,
            "select": self._select,
            "split": self._split,
            "save": self._save,
        }[stage]
        finish = work()
        # Nobody deletes a journal before everybody has read it.
        self._state.wait_for_everyone()
        if self._state.is_main_process:
            counts = finish()
            self._record.finish(stage, counts)
            delete_journals(self._record.path(stage))
            seconds = time.monotonic() - started
            self._progress(f"{stage}: {counts['rows']} rows in {seconds:.1f} s")
        self._state.wait_for_everyone()
        self._record.read()

    def _worker(self, stage: Stage) -> Worker:
        journal = Journal(
            self._record.path(stage),
            self._record.fingerprint(stage),
            self._state.process_index,
            holds="the work of another run (other settings or another input)",
        )
        return Worker(
            journal,
            rank=self._state.process_index,
            processes=self._state.num_processes,
            wait=self._state.wait_for_everyone,
        )

    def _questions(self) -> Callable[[], dict[str, Any]]:
        found = ask(self._config, self._worker("questions"), self._progress)

        def finish() -> dict[str, Any]:
            write_records(found.questions, self._record.path("questions"))
            return {
                "rows": len(found.questions),
                "topics": _nested(found.counts),
                "short": found.short,
            }

        return finish

    def _read_questions(self) -> list[Question]:
        path = self._record.path("questions")
        questions = read_records(Question, path)
        unique_ids(questions, path)
        return questions

    def _answers(self) -> Callable[[], dict[str, Any]]:
        answers = answer(
            self._config, self._read_questions(), self._worker("answers"), self._progress
        )

        def finish() -> dict[str, Any]:
            write_records(answers, self._record.path("answers"))
            return {"rows": len(answers)}

        return finish

    def _judge(self) -> Callable[[], dict[str, Any]]:
        answers = self._read_answers()
        path, guard = self._record.path("judge"), self._config.settings.guard
        rows = [
            Judged(each.id, Conversation.of(each.prompt, each.response), (each.category,))
            for each in answers
            if each.type != "task"
        ]
        verdicts = judge_rows(rows, path, guard) if rows and guard is not None else []

        def finish() -> dict[str, Any]:
            if not verdicts:
                write_text(path, "")
            return {"rows": len(verdicts)}

        return finish

    def _read_answers(self) -> list[Answer]:
        path = self._record.path("answers")
        answers = read_records(Answer, path)
        unique_ids(answers, path)
        return answers

    def _select(self) -> Callable[[], dict[str, Any]]:
        def finish() -> dict[str, Any]:
            settings = self._config.settings.select
            judged = read_records(Judgement, self._record.path("judge"))
            selection = select(
                self._read_questions(),
                self._read_answers(),
                {each.id: each.verdict for each in judged},
                settings,
                seed=self._config.seed(settings.seed),
            )
            write_records(selection.selected, self._record.path("select"))
            return {
                "rows": len(selection.selected),
                "topics": _nested(selection.by_topic),
                "models": _nested(selection.by_model),
            }

        return finish

    def _split(self) -> Callable[[], dict[str, Any]]:
        def finish() -> dict[str, Any]:
            selected = read_records(Selected, self._record.path("select"))
            samples = [_sample(row) for row in selected]
            splits = split_samples(
                samples, self._config.settings.split, seed=self._config.settings.seed
            )
            split_of = {
                (sample.type, sample.prompt): name
                for name, part in splits.items()
                for sample in part
            }
            rows = [
                row.model_copy(update={"split": split_of[row.type, row.prompt]}) for row in selected
            ]
            write_records(rows, self._record.path("split"))
            return {"rows": len(rows)}

        return finish

    def _save(self) -> Callable[[], dict[str, Any]]:
        def finish() -> dict[str, Any]:
            rows = read_records(Selected, self._record.path("split"))
            directory = self._config.output / "data"
            for name in self._record.counts("save").get("files", []):
                (directory / name).unlink(missing_ok=True)
            files, counts = [], {}
            for name in self._config.settings.split:
                part = [_sample(row) for row in rows if row.split == name]
                save_samples(part, directory / f"{name}.jsonl")
                files.append(f"{name}.jsonl")
                counts[name] = dict(Counter(sample.type for sample in part))
            stages = {stage: self._record.counts(stage) for stage in STAGES}
            text = card(self._config, counts, make_funnel(stages), self._record.date)
            write_text(self._record.path("save"), text)
            return {"rows": len(rows), "files": files}

        return finish


def _sample(row: Selected) -> Sample:
    return Sample(
        prompt=row.prompt,
        response=row.response,
        type=row.type,
        source=row.source,
        category=row.category,
    )


def _nested(counts: Mapping[tuple[str, str], Counter[str]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for (first, second), counter in counts.items():
        found.setdefault(first, {})[second] = dict(counter)
    return found
