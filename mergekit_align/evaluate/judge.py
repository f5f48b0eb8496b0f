"""Verdicts of a guard, kept on disk like the models' answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sqlitedict import SqliteDict

from mergekit_align.fingerprint import digest
from mergekit_align.guard import Conversation, GuardSettings, Verdict, load_guard

CHUNK = 512
"""Conversations judged between two writes: a killed run judges at most these again."""


def judge(
    pairs: Sequence[tuple[str, str]], settings: GuardSettings, cache: Path
) -> tuple[list[Verdict], int]:
    """Verdicts on (prompt, response) pairs, in order, and how many of them were not known.

    The guard is loaded only where there is something to judge.
    """
    unique = list(dict.fromkeys(pairs))
    with SqliteDict(
        str(cache / f"guard-{settings.fingerprint()}.sqlite"), autocommit=True
    ) as known:
        missing = [pair for pair in unique if digest(pair) not in known]
        if missing:
            guard = load_guard(settings)
            for start in range(0, len(missing), CHUNK):
                chunk = missing[start : start + CHUNK]
                verdicts = guard.judge([Conversation.of(*pair) for pair in chunk])
                for pair, verdict in zip(chunk, verdicts, strict=True):
                    known[digest(pair)] = tuple(verdict)
        found = {pair: Verdict(*known[digest(pair)]) for pair in unique}
    return [found[pair] for pair in pairs], len(missing)
