"""A guard model in this process: batches, and what happens where memory is short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_align.guard import Conversation, Guard, GuardSettings, Verdict, load_guard, scorer

CONVERSATIONS = [
    Conversation.of(f"How do I make a bench {n}?", "Use iron. " * (n % 7 * 3)) for n in range(20)
]


@pytest.fixture
def guard(world: Path) -> Guard:
    return load_guard(GuardSettings(model=f"{world}/guard", dtype="float32"))


def assert_equal(found: list[Verdict], expected: list[Verdict]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.label == other.label
        assert one.p_unsafe == pytest.approx(other.p_unsafe, abs=1e-5)


def limit_batch(guard: Guard, size: int) -> None:
    """Makes the model run out of memory on more than `size` rows, as CUDA would."""

    def check(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        if len(keywords["input_ids"]) > size:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    guard._scorer.model.register_forward_pre_hook(check, with_kwargs=True)  # type: ignore[attr-defined]


def test_the_preamble_changes_nothing(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = guard.judge(CONVERSATIONS)
    assert guard._scorer._preambles  # type: ignore[attr-defined]
    monkeypatch.setattr(scorer, "MIN_SHARED", 10**6)
    assert_equal(guard.judge(CONVERSATIONS), shared)


def test_batches_change_nothing_and_results_keep_their_order(guard: Guard) -> None:
    one_by_one = [guard.judge([conversation])[0] for conversation in CONVERSATIONS]
    assert_equal(guard.judge(CONVERSATIONS), one_by_one)


def test_a_batch_that_exhausts_memory_is_halved(guard: Guard) -> None:
    expected = guard.judge(CONVERSATIONS)
    limit_batch(guard, 3)
    assert_equal(guard.judge(CONVERSATIONS), expected)


def test_one_prompt_that_exhausts_memory_is_unreadable(guard: Guard) -> None:
    guard.judge(CONVERSATIONS)
    limit_batch(guard, 0)
    verdicts = guard.judge(CONVERSATIONS)
    assert {verdict.label for verdict in verdicts} == {"unreadable"}
    assert {verdict.evidence for verdict in verdicts} == {"out of memory"}


def test_another_failure_is_a_failure(guard: Guard) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("a defect")

    guard._scorer.model.register_forward_pre_hook(fail)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="a defect"):
        guard.judge(CONVERSATIONS)
