"""Judge a file of responses: resumable, and in as many processes as there are GPUs.

Responses are judged in chunks of a size that depends on their number alone. Every finished chunk is in
a journal beside the output, and the processes share the chunks out by number. So a chunk is computed
in the same way whoever computes it, a killed run judges no finished chunk again, and the output is the
same whether one process wrote it or many.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from mergekit_align.checks import check_writable
from mergekit_align.files import write_text
from mergekit_align.fingerprint import digest
from mergekit_align.guard.guard import check_guard, load_guard
from mergekit_align.guard.responses import Judged, load_responses
from mergekit_align.guard.settings import GuardSettings
from mergekit_align.guard.verdict import Verdict
from mergekit_align.journal import Journal, json_line

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
    output = Path(output)
    rows = load_responses(paths, prompts_only=prompts_only)
    check_writable(str(output.parent), str(output), "directory")
    return _summary(rows, judge_rows(rows, output, settings))


def judge_rows(
    rows: Sequence[Judged], output: Path, settings: GuardSettings
) -> list[dict[str, Any]]:
    """As `judge_file`, of responses that are read already; returns what the output's lines hold.

    Raises:
        InputError: the guard cannot be used, or its backend fails.
    """
    from accelerate import PartialState

    check_guard(settings)
    state = PartialState()
    if state.num_processes > 1 and settings.device is None and settings.backend is None:
        settings = settings.model_copy(update={"device": str(state.device)})
    size = min(max(len(rows) // CHUNKS, SMALLEST_CHUNK), LARGEST_CHUNK)
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    journal = Journal(
        output,
        _run_fingerprint(rows, settings),
        state.process_index,
        holds="the verdicts of another run (other responses, guard or settings)",
    )
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
        write_text(output, "".join(map(json_line, records)))
        journal.delete()
    return records


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


def _run_fingerprint(rows: Sequence[Judged], settings: GuardSettings) -> str:
    """What a run's verdicts depend on."""
    return digest([settings.fingerprint(), [[row.id, row.conversation.turns] for row in rows]])[:16]
