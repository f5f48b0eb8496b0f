"""What a run has done so far: `run.json` in its output directory.

For every stage it keeps the settings that the stage depends on, the models' and files' fingerprints
among them, digests of its input, and its counts. A stage is done when its output is there and its input
is what it was. So a stage's file that a person edits makes the later stages run again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_align.errors import InputError
from mergekit_align.files import write_text
from mergekit_align.generate.settings import STAGES, Stage

FILES: dict[Stage, str] = {
    "questions": "questions.jsonl",
    "answers": "answers.jsonl",
    "judge": "verdicts.jsonl",
    "select": "selected.jsonl",
    "split": "split.jsonl",
    "save": "README.md",
}
"""Each stage's output."""
INPUTS: dict[Stage, tuple[Stage, ...]] = {
    "questions": (),
    "answers": ("questions",),
    "judge": ("answers",),
    "select": ("questions", "answers", "judge"),
    "split": ("select",),
    "save": ("split",),
}
"""The stages whose outputs each stage reads."""


class Record:
    """`run.json`, read, and written as stages end.

    Args:
        output: the run's directory.
        settings: what each stage depends on, as JSON has it.
        again: stages that are to run again, whatever was done; their settings may be other ones.

    Raises:
        InputError: the directory holds another config's run, or other files.
    """

    def __init__(
        self,
        output: Path,
        settings: Mapping[Stage, Any],
        *,
        date: str,
        again: frozenset[Stage] = frozenset(),
    ) -> None:
        self._file = output / "run.json"
        self._output = output
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._content: dict[str, Any] = {"date": date, "settings": {}, "stages": {}}
        if self._file.exists():
            self.read()
        elif output.exists() and any(output.iterdir()):
            raise InputError(
                f"{output}: found other files; expected a new or an empty directory (output)"
            )
        self._check(again)
        for stage in again:
            if stage in self._content["stages"]:
                self._content["stages"][stage]["input"] = None
            self._content["settings"][stage] = self._settings[stage]
        for stage in STAGES:
            self._content["settings"].setdefault(stage, self._settings[stage])

    def write(self) -> None:
        """Write it down, stages in their order."""
        for part in ("settings", "stages"):
            known = self._content[part]
            self._content[part] = {stage: known[stage] for stage in STAGES if stage in known}
        write_text(self._file, json.dumps(self._content, indent=1, ensure_ascii=False) + "\n")

    @property
    def date(self) -> str:
        """The day on which the run began."""
        return str(self._content["date"])

    def is_done(self, stage: Stage) -> bool:
        """Whether a stage's output is there, made of the input that is there."""
        done = self._content["stages"].get(stage)
        return (
            done is not None and self.path(stage).exists() and done["input"] == self._inputs(stage)
        )

    def finish(self, stage: Stage, counts: Mapping[str, Any]) -> None:
        """Write down that a stage's output is complete, and its counts."""
        self._content["stages"][stage] = {"input": self._inputs(stage), **counts}
        self.write()

    def counts(self, stage: Stage) -> dict[str, Any]:
        """What `finish` was given; nothing of a stage that is not done."""
        found: dict[str, Any] = self._content["stages"].get(stage, {})
        return found

    def path(self, stage: Stage) -> Path:
        """A stage's output."""
        return self._output / FILES[stage]

    def fingerprint(self, stage: Stage) -> str:
        """Of all that a stage's work depends on."""
        parts = [self._settings[stage], self._inputs(stage)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def check_inputs(self, stage: Stage) -> None:
        """That what a stage reads is there.

        Raises:
            InputError: it is not.
        """
        for needed in INPUTS[stage]:
            if not self.path(needed).exists():
                raise InputError(
                    f"{self.path(needed)}: found no such file; expected the output of the stage "
                    f"{needed!r}, which {stage!r} reads"
                )

    def _inputs(self, stage: Stage) -> dict[str, str]:
        return {
            FILES[needed]: hashlib.sha256(self.path(needed).read_bytes()).hexdigest()[:16]
            for needed in INPUTS[stage]
            if self.path(needed).exists()
        }

    def read(self) -> None:
        """Read it again: another process may have written it.

        Raises:
            InputError: it is no record of a run.
        """
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
            content = {key: content[key] for key in ("date", "settings", "stages")}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self._file}: found no record of a run; delete it") from error
        self._content = content

    def _check(self, again: frozenset[Stage]) -> None:
        for stage in STAGES:
            if stage in again or stage not in self._content["settings"]:
                continue
            other = _difference(self._content["settings"][stage], self._settings[stage])
            if other is not None:
                key, found, expected = other
                raise InputError(
                    f"{self._output}: found another config's run ({'.'.join([stage, *key])} is "
                    f"{found} there, and {expected} here); expected this one's: name another "
                    f"output, or run again `--from {stage}`"
                )


def _difference(found: Any, expected: Any) -> tuple[list[str], str, str] | None:
    """The first place where two settings differ, and what is there."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in [*found, *(key for key in expected if key not in found)]:
            inner = _difference(found.get(key), expected.get(key))
            if inner is not None:
                return [key, *inner[0]], inner[1], inner[2]
        return None
    if found == expected:
        return None
    return [], json.dumps(found)[:60], json.dumps(expected)[:60]
