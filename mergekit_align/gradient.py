"""How likely a model finds responses, and how it decides, as something to differentiate.

For a merge that is linear in its weights one backward pass is enough for all of them: a weight's
gradient is the inner product of the parameters' gradient with the model that it scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mergekit_align.encoding import EncodedSample
from mergekit_align.openings import Openings
from mergekit_align.output_layer import continuation_logprobs, next_logprobs
from mergekit_align.reading import BATCH_LOGITS, read_once, vocabulary_size
from mergekit_align.trees import Budget, Query, TreeBatch, plan_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 2048
"""Tokens in a batch, padding included: their activations are kept for the backward pass."""


class MeanOverSamples:
    """A mean over samples of what a model makes of them, as something to climb.

    How the samples are read is worked out once: a model's parameters may change in between.

    Args:
        summed: what a batch adds to the sum, differentiable.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        queries: Sequence[Query],
        summed: Callable[[TreeBatch], torch.Tensor],
        budget: Budget | None = None,
    ) -> None:
        self._batches = list(plan_batches(model, queries, budget or Budget(BATCH_TOKENS)))
        self._count = len(queries)
        self._summed = summed

    def accumulate(self) -> float:
        """The mean; its gradient is added to the parameters' `grad`."""
        total = 0.0
        for batch in self._batches:
            value = self._summed(batch) / self._count
            value.backward()  # type: ignore[no-untyped-call]
            total += float(value.detach())
        return total


def mean_loss(model: PreTrainedModel, encoded: Sequence[EncodedSample]) -> MeanOverSamples:
    """The mean sample loss, nats a token."""

    def summed(batch: TreeBatch) -> torch.Tensor:
        return -(_logprobs(model, batch) / batch.lengths).sum()

    return MeanOverSamples(model, _responses(encoded), summed)


def sample_loss(model: PreTrainedModel, sample: EncodedSample) -> torch.Tensor:
    """The loss of one sample (nats/token), to be differentiated; all of its tokens are read."""
    response = sample.response_ids
    # Nothing is predicted after the last token, which is read for what comes after it.
    query = Query(sample.prompt_ids, [response, [*response, response[0]]])
    (batch,) = plan_batches(model, [query], Budget(BATCH_TOKENS))
    cache = _cache(model, batch)
    return -continuation_logprobs(model, batch, cache)[0] / len(response)


def mean_logprob(
    model: PreTrainedModel, encoded: Sequence[EncodedSample], *, by_token: bool
) -> MeanOverSamples:
    """The responses' mean log-probability.

    Args:
        by_token: mean over each response's tokens (nats/token) in place of their sum (nats).
    """

    def summed(batch: TreeBatch) -> torch.Tensor:
        logprobs = _logprobs(model, batch)
        return (logprobs / batch.lengths if by_token else logprobs).sum()

    return MeanOverSamples(model, _responses(encoded), summed)


def mean_decision(
    model: PreTrainedModel,
    encoded: Sequence[EncodedSample],
    openings: Openings,
    *,
    refusal_wanted: bool,
    margin: bool,
) -> MeanOverSamples:
    """The mean log-probability of the wanted decision.

    Args:
        openings: of refusals and of help, as `loss` compares them.
        margin: the decision's log-odds in place of its log-probability, nats.
    """

    def summed(batch: TreeBatch) -> torch.Tensor:
        logprobs = _logprobs(model, batch)
        odds = openings.margins(logprobs.view(-1, len(openings.every)))
        odds = odds if refusal_wanted else -odds
        return (odds if margin else torch.nn.functional.logsigmoid(odds)).sum()

    queries = [Query(each.prompt_ids, openings.every) for each in encoded]
    return MeanOverSamples(model, queries, summed)


class Lesson(NamedTuple):
    """A sample with what a teacher predicts at each token of its response."""

    prompt_ids: list[int]
    response_ids: list[int]
    likeliest: torch.Tensor
    """Token ids, [tokens, kept]."""
    logprobs: torch.Tensor
    """Of these, nats, [tokens, kept]."""


@torch.no_grad()
def lessons(
    teacher: PreTrainedModel, encoded: Sequence[EncodedSample], *, kept: int
) -> list[Lesson]:
    """What `teacher` predicts of the samples' responses, in their order.

    Args:
        kept: the likeliest tokens of each prediction, so many.
    """
    found: dict[int, Lesson] = {}
    for batch in plan_batches(teacher, _responses(encoded), _whole_budget(teacher)):
        following = next_logprobs(teacher, batch, _cache(teacher, batch))
        best = following.topk(min(kept, following.shape[1]))
        lengths = batch.lengths.tolist()
        likeliest, logprobs = (
            torch.split(each.cpu(), lengths) for each in (best.indices, best.values)
        )
        for index, *predicted in zip(batch.queries, likeliest, logprobs, strict=True):
            found[index] = Lesson(*encoded[index], *predicted)
    return [found[index] for index in range(len(encoded))]


def mean_nearness(model: PreTrainedModel, taught: Sequence[Lesson]) -> MeanOverSamples:
    """Minus the mean divergence from the teacher (see `evolve.distillation`), nats a token."""

    def summed(batch: TreeBatch) -> torch.Tensor:
        following = next_logprobs(model, batch, _cache(model, batch))
        likeliest = torch.cat([taught[index].likeliest for index in batch.queries])
        teacher = torch.cat([taught[index].logprobs for index in batch.queries])
        own = following.gather(1, likeliest.to(following.device))
        divergence = _divergence(teacher.to(following.device), own)
        return -(divergence / batch.lengths[batch.owners]).sum()

    samples = [EncodedSample(each.prompt_ids, each.response_ids) for each in taught]
    return MeanOverSamples(model, _responses(samples), summed, _whole_budget(model))


def _divergence(teacher: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """KL divergence [tokens] of log-probabilities [tokens, kept]; all that is not kept is one more."""
    kept = (teacher.exp() * (teacher - model)).sum(1)
    least = torch.finfo(model.dtype).eps
    own, its = ((1 - each.exp().sum(1)).clamp(min=least) for each in (teacher, model))
    return kept + own * (own.log() - its.log())


def _responses(encoded: Sequence[EncodedSample]) -> list[Query]:
    return [Query(each.prompt_ids, [each.response_ids]) for each in encoded]


def _whole_budget(model: PreTrainedModel) -> Budget:
    """All logits of a batch's predictions are held at once."""
    return Budget(BATCH_TOKENS, BATCH_LOGITS // vocabulary_size(model))


def _logprobs(model: PreTrainedModel, batch: TreeBatch) -> torch.Tensor:
    """Of each continuation."""
    return continuation_logprobs(model, batch, _cache(model, batch), whole=False)


def _cache(model: PreTrainedModel, batch: TreeBatch) -> Any:
    """What a batch's prompts share, read for this batch alone: its graph goes with the batch's."""
    if not batch.shared:
        return None
    cache = read_once(model, batch.shared)
    cache.batch_repeat_interleave(len(batch.ids))
    return cache
