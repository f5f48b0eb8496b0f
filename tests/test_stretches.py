"""Arithmetic in stretches is the arithmetic of the whole; and what LED-Merging locates."""

from __future__ import annotations

import pytest
import torch

from mergekit_align.merge_methods.led import located
from mergekit_align.stretches import ENTRIES, in_stretches


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_stretches_join_without_a_seam(more: int) -> None:
    size = 2 * ENTRIES * torch.get_num_threads() + more
    first, second = torch.randn(size).bfloat16(), torch.randn(size) > 0
    found = in_stretches(lambda a, b: torch.where(b, 2 * a, -a), [first, second], torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.where(second, 2 * first.float(), -first.float()))


def test_tensors_need_not_be_contiguous_and_may_be_empty() -> None:
    tensor = torch.randn(300, 500).T
    assert torch.equal(in_stretches(torch.neg, [tensor], torch.float32), -tensor)
    assert in_stretches(torch.neg, [torch.empty(0, 4)], torch.float32).shape == (0, 4)


@pytest.mark.parametrize("shape", [(40, 50), (400, 500)])  # without and with a sample
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
def test_as_many_are_located_as_asked_for(ratio: float, shape: tuple[int, int]) -> None:
    importance = torch.randint(0, 4, shape).float()  # most have equals
    chosen = located(importance, ratio)
    assert chosen.sum() == round(ratio * importance.numel())
    assert not chosen.any() or chosen.all() or importance[chosen].min() >= importance[~chosen].max()


@pytest.mark.parametrize("ratio", [0.001, 0.3, 0.999])
def test_those_located_are_the_highest(ratio: float) -> None:
    importance = torch.randn(400, 500).square()
    highest = importance.flatten().topk(round(ratio * importance.numel())).indices
    expected = torch.zeros(importance.numel(), dtype=torch.bool)
    expected[highest] = True
    assert torch.equal(located(importance, ratio).flatten(), expected)
