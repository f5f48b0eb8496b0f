"""Sample loss as something to minimise: its gradient with respect to a model's parameters.

For a merge that is linear in its weights one backward pass is enough for all of them: a weight's
gradient is the inner product of the parameters' gradient with the model that it scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mergekit_align.encoding import EncodedSample
from mergekit_align.output_layer import last_logprobs
from mergekit_align.reading import length_sorted_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 2048
"""Tokens in a batch, padding included: their activations are kept for the backward pass."""


def accumulate_gradient(model: PreTrainedModel, encoded: Sequence[EncodedSample]) -> float:
    """The mean sample loss (nats/token); its gradient is added to the parameters' `grad`."""
    batches = length_sorted_batches(
        [each.lengths for each in encoded], lambda size: size.padded <= BATCH_TOKENS
    )
    total = 0.0
    for batch in batches:
        loss = summed_loss(model, [encoded[n] for n in batch]) / len(encoded)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total


def summed_loss(model: PreTrainedModel, batch: Sequence[EncodedSample]) -> torch.Tensor:
    """Sum of the sample losses of a batch (nats/token), to be differentiated."""
    # Prompts end, and responses begin, at one place: logits are needed from there on alone.
    before = max(len(each.prompt_ids) for each in batch)
    after = max(len(each.response_ids) for each in batch)
    ids = torch.zeros(len(batch), before + after, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, each in enumerate(batch):
        start, end = before - len(each.prompt_ids), before + len(each.response_ids)
        ids[row, start:end] = torch.tensor([*each.prompt_ids, *each.response_ids])
        mask[row, start:end] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    nll = -last_logprobs(model, ids, mask, positions, after)
    answered = mask[:, before:]
    loss: torch.Tensor = ((nll * answered).sum(1) / answered.sum(1)).sum()
    return loss
