"""Judge a file of responses: resumable, and in as many processes as there are GPUs.

Responses are judged in chunks of a size that depends on their number alone. Every chunk is a line of
a journal beside the output, one journal a process (`OUTPUT.partial-RANK`), and the processes share
the chunks out by number. So a chunk is computed in the same way whoever computes it, a killed run
judges no finished chunk again, and the output is the same whether one process wrote it or many. A
last line that was cut off by a kill is dropped.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from mergekit_align.checks import check_writable
from mergekit_align.errors import InputError
from mergekit_align.files import write_text
from mergekit_align.fingerprint import model_fingerprint
from mergekit_align.guard.guard import load_guard
from mergekit_align.guard.responses import Judged, load_responses
from mergekit_align.guard.settings import GuardSettings
from mergekit_align.guard.verdict import Verdict

SMALLEST_CHUNK, LARGEST_CHUNK = 8, 128
CHUNKS = 64
"""As many as this, sizes allowing: enough to share out, few enough to batch well."""


class Summary(NamedTuple):
    """What a file's verdicts come to."""

    responses: int
    safe: int
    unsafe: int
    unreadable: int
    cut: int
    by_guard_category: dict[str, int]
    """Unsafe responses by what the guard says they violate."""
    by_category: dict[str, tuple[int, int]]
    """Safe and readable responses by the category that the file gives them."""

    @property
    def safe_rate(self) -> float:
        """Share of safe responses among those with a readable verdict; `nan` without any."""
        readable = self.safe + self.unsafe
        return self.safe / readable if readable else float("nan")


def judge_file(
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    settings: GuardSettings,
    *,
    prompts_only: bool = False,
) -> Summary:
    """Judge the responses in `paths` and write a JSON line for each, in their order, to `output`.

    Under `accelerate launch` every process calls it; each returns the summary.

    Raises:
        InputError: the files, the guard or the output cannot be used, or the guard's backend fails;
            what was judged by then is kept for the next call.
    """
    from accelerate import PartialState

    output = Path(output)
    rows = load_responses(paths, prompts_only=prompts_only)
    check_writable(str(output.parent), str(output), "directory")
    state = PartialState()
    if state.num_processes > 1 and settings.device is None and settings.backend is None:
        settings = settings.model_copy(update={"device": str(state.device)})
    size = min(max(len(rows) // CHUNKS, SMALLEST_CHUNK), LARGEST_CHUNK)
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    journal = _Journal(output, _run_fingerprint(rows, settings), state.process_index)
    done = journal.chunks()
    mine = [n for n in range(len(chunks)) if n % state.num_processes == state.process_index]
    missing = [number for number in mine if number not in done]
    if missing:
        guard = load_guard(settings)
        progress = tqdm(
            total=sum(len(chunks[n]) for n in mine),
            initial=sum(len(chunks[n]) for n in mine if n in done),
            unit=" responses",
            disable=state.process_index != 0,
        )
        for number in missing:
            verdicts = guard.judge([row.conversation for row in chunks[number]])
            journal.append(
                number, [_record(*pair) for pair in zip(chunks[number], verdicts, strict=True)]
            )
            progress.update(len(verdicts))
        progress.close()
    state.wait_for_everyone()
    done = journal.chunks()
    records = [record for number in range(len(chunks)) for record in done[number]]
    state.wait_for_everyone()
    if state.process_index == 0:
        write_text(output, "".join(map(_line, records)))
        journal.delete()
    return _summary(rows, records)


def _record(row: Judged, verdict: Verdict) -> dict[str, Any]:
    """A line of the output. Probabilities are rounded, so that the order of sums cannot show."""
    return {
        "id": row.id,
        "turns": list(row.conversation.turns),
        "verdict": verdict.label,
        "p_unsafe": None if verdict.p_unsafe is None else round(verdict.p_unsafe, 5),
        "p_controversial": round(verdict.p_controversial, 5),
        "readable": round(verdict.readable, 5) if verdict.readable == verdict.readable else None,
        "categories": list(verdict.categories),
        "cut": verdict.cut,
        "evidence": verdict.evidence,
    }


def _summary(rows: Sequence[Judged], records: Sequence[dict[str, Any]]) -> Summary:
    labels = Counter(record["verdict"] for record in records)
    by_category: dict[str, tuple[int, int]] = {}
    for row, record in zip(rows, records, strict=True):
        if record["verdict"] != "unreadable":
            for category in row.categories:
                safe, readable = by_category.get(category, (0, 0))
                by_category[category] = (safe + (record["verdict"] == "safe"), readable + 1)
    return Summary(
        len(records),
        labels["safe"],
        labels["unsafe"],
        labels["unreadable"],
        sum(record["cut"] for record in records),
        dict(Counter(code for record in records for code in record["categories"]).most_common()),
        dict(sorted(by_category.items())),
    )


class _Journal:
    """Finished chunks on disk, of one run; this process appends to a file of its own."""

    def __init__(self, output: Path, fingerprint: str, rank: int) -> None:
        self._output = output
        self._fingerprint = fingerprint
        self._own = output.with_name(f"{output.name}.partial-{rank}")

    def chunks(self) -> dict[int, list[dict[str, Any]]]:
        """The records of every finished chunk, whoever judged it.

        Raises:
            InputError: a journal belongs to another run.
        """
        found: dict[int, list[dict[str, Any]]] = {}
        for path in self._files():
            lines = _whole_lines(path)
            header = next(lines, None)
            if header is not None and header != {"run": self._fingerprint}:
                raise InputError(
                    f"{path}: found the verdicts of another run (other responses, guard or "
                    "settings); expected this one's: delete it, or name another output"
                )
            found.update((line["chunk"], line["records"]) for line in lines)
        return found

    def append(self, number: int, records: Sequence[dict[str, Any]]) -> None:
        if not self._own.exists():
            self._own.touch()
        whole = sum(len(line) for line in _raw_lines(self._own))
        with self._own.open("r+b") as file:
            file.truncate(whole)
            file.seek(whole)
            if not whole:
                file.write(_line({"run": self._fingerprint}).encode())
            file.write(_line({"chunk": number, "records": records}).encode())
            file.flush()
            os.fsync(file.fileno())

    def delete(self) -> None:
        for path in self._files():
            path.unlink()

    def _files(self) -> list[Path]:
        return sorted(self._output.parent.glob(f"{glob.escape(self._output.name)}.partial-*"))


def _line(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"


def _raw_lines(path: Path) -> Iterator[bytes]:
    """The lines of a journal, but for a last one that was cut off."""
    with path.open("rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, _raw_lines(path))


def _run_fingerprint(rows: Sequence[Judged], settings: GuardSettings) -> str:
    """What a run's verdicts depend on; the device is not part of it."""
    digest = hashlib.sha256(model_fingerprint(settings.model).encode())
    digest.update(settings.model_dump_json(exclude={"device", "backend_args"}).encode())
    for row in rows:
        digest.update(json.dumps([row.id, row.conversation.turns]).encode())
    return digest.hexdigest()[:16]
