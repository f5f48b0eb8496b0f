"""Verdicts of a guard, kept on disk like the models' answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from sqlitedict import SqliteDict

import mergekit_align
from mergekit_align.fingerprint import commit, model_fingerprint
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
    with SqliteDict(str(cache / f"{_fingerprint(settings)}.sqlite"), autocommit=True) as known:
        missing = [pair for pair in unique if _key(pair) not in known]
        if missing:
            guard = load_guard(settings)
            for start in range(0, len(missing), CHUNK):
                chunk = missing[start : start + CHUNK]
                verdicts = guard.judge([Conversation.of(*pair) for pair in chunk])
                for pair, verdict in zip(chunk, verdicts, strict=True):
                    known[_key(pair)] = tuple(verdict)
        found = {pair: Verdict(*known[_key(pair)]) for pair in unique}
    return [found[pair] for pair in pairs], len(missing)


def _key(pair: tuple[str, str]) -> str:
    return hashlib.sha256(json.dumps(pair).encode()).hexdigest()


def _fingerprint(settings: GuardSettings) -> str:
    parts = [
        model_fingerprint(settings.model),
        commit(settings.model),
        settings.model_dump_json(exclude={"device", "batch_size"}),
        _profile_file(settings.profile),
        mergekit_align.__version__,
    ]
    return "guard-" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _profile_file(profile: str | None) -> str | None:
    """What a profile of the user's own says: it may change under the same name."""
    if profile is None or not Path(profile).is_file():
        return None
    return Path(profile).read_text(encoding="utf-8")
