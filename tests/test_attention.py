"""Attention by blocks is PyTorch's attention of the whole row."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_output_layer import model_of
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mergekit_align import attention
from mergekit_align.attention import BLOCK, Blocks, block_attention
from mergekit_align.encoding import EncodedSample
from mergekit_align.gradient import mean_loss
from mergekit_align.loss import response_scores

SAMPLES = [EncodedSample([5, 6, 7, 8], [9, 10]), EncodedSample([5, 6, 11], [12, 13, 14])]


def ends_of(depths: list[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The last place that sees each token of a walk through a tree."""
    ends = []
    for place, depth in enumerate(depths):
        after = [n for n in range(place + 1, len(depths)) if depths[n] <= depth]
        ends.append((after[0] if after else len(depths)) - 1)
    return np.array(ends)


def walk(tokens: int, seed: int = 0) -> list[int]:
    """Depths of a random tree's tokens: most go on, some begin again further up."""
    rng, depths = random.Random(seed), [0]
    while len(depths) < tokens:
        depths.append(rng.randrange(depths[-1] + 1) if rng.random() < 0.1 else depths[-1] + 1)
    return depths


def seen_by(ends: np.ndarray[Any, np.dtype[np.int64]]) -> torch.Tensor:
    """Whether a token sees another, [tokens, tokens]."""
    place = torch.arange(len(ends))
    reader = place.unsqueeze(1)
    return (place <= reader) & (reader <= torch.from_numpy(ends))


@given(st.integers(1, 5 * BLOCK), st.integers(0, 9))
def test_blocks_see_what_their_tokens_see(tokens: int, seed: int) -> None:
    ends = ends_of(walk(tokens, seed))
    row, expected = Blocks.of(ends), seen_by(ends)
    found = torch.zeros(len(row.order) * BLOCK, tokens, dtype=torch.long)
    for group in row.groups:
        for block, keys, seen in zip(group.blocks.tolist(), group.keys, group.seen, strict=True):
            own = slice(block * BLOCK, (block + 1) * BLOCK)
            found[own].index_add_(1, keys, seen.long())
    assert torch.equal(found[:tokens], expected.long())
    assert not found[tokens:].any()
    assert torch.equal(row.blocks[row.order], torch.arange(len(row.order)))


@pytest.mark.parametrize("kept", [True, False])
def test_small_masks_are_made_once(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Blocks.of(ends_of(walk(3 * BLOCK)))
    size = sum(each.keys.numel() for each in row.groups) * BLOCK
    monkeypatch.setattr(attention, "KEPT_MASKS", size if kept else size - 1)
    with torch.inference_mode():
        first = row.masks(torch.bfloat16)
    again, other = row.masks(torch.bfloat16), row.masks(torch.float32)
    assert (again is first) == kept
    for group, *masks in zip(row.groups, first, again, other, strict=True):
        for mask in masks:
            assert torch.equal(mask.squeeze(1) == 0, group.seen)
            assert not mask.is_inference()  # it may take part in a backward pass


def drawn(heads: int, key_heads: int, tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values."""
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, tokens, 16), (key_heads, tokens, 16), (key_heads, tokens, 24)
    return [
        torch.randn(1, *shape, generator=generator).to(dtype).requires_grad_() for shape in shapes
    ]


def both(inputs: list[torch.Tensor], **options: Any) -> tuple[list[torch.Tensor], ...]:
    """Outputs and gradients by blocks and by the fused kernel."""
    tokens, dtype = inputs[0].shape[2], inputs[0].dtype
    ends = ends_of(walk(tokens))
    mask = torch.zeros(1, 1, tokens, tokens, dtype=dtype)
    mask.masked_fill_(~seen_by(ends), torch.finfo(dtype).min)
    module = torch.nn.Module()
    module.num_key_value_groups = inputs[0].shape[1] // inputs[1].shape[1]  # type: ignore[assignment]
    model = model_of("llama").to(dtype)

    def found(output: torch.Tensor) -> list[torch.Tensor]:
        return [output, *torch.autograd.grad(output.square().sum(), inputs)]

    with block_attention(model, Blocks.of(ends)) as nothing:
        by_blocks = found(attention._by_blocks(module, *inputs, nothing, **options)[0])
    return by_blocks, found(sdpa_attention_forward(module, *inputs, mask, **options)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", [None, 0.1])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("tokens", [1, BLOCK, 5 * BLOCK + 7])
@pytest.mark.parametrize("scores", [2**24, 2**14])
def test_outputs_and_gradients_are_those_of_the_fused_kernel(
    tokens: int,
    key_heads: int,
    scaling: float | None,
    dtype: torch.dtype,
    scores: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "MOST_SCORES", scores)
    for one, other in zip(*both(drawn(4, key_heads, tokens, dtype), scaling=scaling), strict=True):
        assert one.shape == other.shape
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def test_what_else_a_model_has_done_to_the_scores_is_left_to_the_fused_kernel() -> None:
    inputs = drawn(4, 4, 40, torch.float32)
    for name, value in (("position_bias", torch.randn(1, 4, 40, 40)), ("dropout", 1.0)):
        for one, other in zip(*both(inputs, **{name: value}), strict=True):
            torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="softcap"):
        both(inputs, softcap=30.0)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest scores that a softmax is taken of."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten._softmax.default:
            self.scores = max(self.scores, args[0].numel())
        return function(*args, **(kwargs or {}))


def test_no_more_scores_are_held_than_memory_should(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = drawn(4, 2, 9 * BLOCK, torch.float32)
    with Largest() as watch:
        both(inputs)
    whole = watch.scores
    monkeypatch.setattr(attention, "MOST_SCORES", whole // 3)
    with Largest() as watch:
        both(inputs)
    assert 0 < watch.scores <= whole // 3


def test_scores_beyond_that_are_not_kept_for_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kept() -> int:
        storages: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        inputs = drawn(4, 2, 9 * BLOCK, torch.float32)
        row = Blocks.of(ends_of(walk(9 * BLOCK)))
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with block_attention(model_of("llama"), row) as nothing, hooks:
            output, _ = attention._by_blocks(torch.nn.Module(), *inputs, nothing)
        assert output.requires_grad
        return sum(storages.values())

    most = kept()
    monkeypatch.setattr(attention, "MOST_SCORES", 2**14)
    assert kept() < most / 2


def kernels(run: object) -> set[str]:
    with torch.profiler.profile() as profile:
        run()  # type: ignore[operator]
    return {event.name for event in profile.events() if "scaled_dot_product" in event.name}


def test_trees_are_read_by_blocks_and_the_model_is_left_as_it_was() -> None:
    model = model_of("llama")
    assert not kernels(lambda: response_scores(model, SAMPLES))
    assert not kernels(lambda: mean_loss(model, SAMPLES).accumulate())
    assert model.config._attn_implementation == "sdpa"


def test_another_attention_stays() -> None:
    model: PreTrainedModel = model_of("llama")
    assert attention.reads_blocks(model)
    model.set_attn_implementation("eager")
    assert not attention.reads_blocks(model)
