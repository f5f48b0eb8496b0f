"""How likely a model finds responses, and how it decides, as something to differentiate.

For a merge that is linear in its weights one backward pass is enough for all of them: a weight's
gradient is the inner product of the parameters' gradient with the model that it scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from mergekit_align.encoding import EncodedSample
from mergekit_align.openings import Openings, TokenIds
from mergekit_align.output_layer import last_logprobs
from mergekit_align.reading import (
    BATCH_LOGITS,
    MIN_SHARED,
    BatchSize,
    length_sorted_batches,
    may_share,
    read_once,
    run_model,
    shared_length,
    vocabulary_size,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 2048
"""Tokens in a batch, padding included: their activations are kept for the backward pass."""


def accumulate_gradient(model: PreTrainedModel, encoded: Sequence[EncodedSample]) -> float:
    """The mean sample loss (nats/token); its gradient is added to the parameters' `grad`."""
    return _accumulate(encoded, partial(summed_loss, model))


def summed_loss(model: PreTrainedModel, batch: Sequence[EncodedSample]) -> torch.Tensor:
    """Sum of the sample losses of a batch (nats/token), to be differentiated."""
    logprobs, counts = _response_logprobs(model, batch)
    return -(logprobs / counts).sum()


def accumulate_logprob_gradient(
    model: PreTrainedModel, encoded: Sequence[EncodedSample], *, by_token: bool
) -> float:
    """The responses' mean log-probability; its gradient is added to the parameters' `grad`.

    Args:
        by_token: mean over each response's tokens (nats/token) in place of their sum (nats).
    """

    def summed(batch: Sequence[EncodedSample]) -> torch.Tensor:
        logprobs, counts = _response_logprobs(model, batch)
        return (logprobs / counts if by_token else logprobs).sum()

    return _accumulate(encoded, summed)


def accumulate_decision_gradient(
    model: PreTrainedModel,
    encoded: Sequence[EncodedSample],
    openings: Openings,
    *,
    refusal_wanted: bool,
    margin: bool,
) -> float:
    """The mean log-probability of the wanted decision; its gradient is added to the parameters' `grad`.

    Args:
        openings: of refusals and of help, as `loss` compares them.
        margin: the decision's log-odds in place of its log-probability, nats.
    """
    # What the prompts are read with, once for each: together they contain every beginning.
    branches = openings.shared_beginnings() or [()]
    rows = [EncodedSample(each.prompt_ids, [*branch, 0]) for each in encoded for branch in branches]
    width = len(branches)

    def summed(batch: Sequence[EncodedSample]) -> torch.Tensor:
        following = _next_logprobs(model, batch)
        after: dict[TokenIds, torch.Tensor] = {}
        for index, branch in enumerate(branches):
            for length in range(len(branch) + 1):
                # Responses begin at one place, where the prompt's last token predicts.
                after[branch[:length]] = following[index::width, length]

        def logprob(kind: Sequence[TokenIds]) -> torch.Tensor:
            each = [
                torch.stack([after[o[:n]][:, token] for n, token in enumerate(o)]).sum(0)
                for o in kind
            ]
            return torch.stack(each).logsumexp(0)

        odds = logprob(openings.refusal) - logprob(openings.help)
        odds = odds if refusal_wanted else -odds
        return (odds if margin else torch.nn.functional.logsigmoid(odds)).sum()

    return _accumulate(rows, summed, group=width)


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
    lengths = [each.lengths for each in encoded]
    for batch in length_sorted_batches(lengths, partial(_fits_whole, teacher)):
        chosen = [encoded[index] for index in batch]
        following = _next_logprobs(teacher, chosen)
        best = following.topk(min(kept, following.shape[2]))
        for row, (index, each) in enumerate(zip(batch, chosen, strict=True)):
            own = slice(len(each.response_ids))
            found[index] = Lesson(*each, best.indices[row, own].cpu(), best.values[row, own].cpu())
    return [found[index] for index in range(len(encoded))]


def accumulate_distillation_gradient(model: PreTrainedModel, taught: Sequence[Lesson]) -> float:
    """Minus the mean divergence from the teacher (see `evolve.distillation`), nats a token.

    Its gradient is added to the parameters' `grad`.
    """

    def summed(batch: Sequence[Lesson]) -> torch.Tensor:
        following = _next_logprobs(model, batch)
        divergences = [
            _divergence(
                each.logprobs.to(model.device),
                own[: len(each.response_ids)].gather(1, each.likeliest.to(model.device)),
            )
            for own, each in zip(following, batch, strict=True)
        ]
        return -torch.stack([each.mean() for each in divergences]).sum()

    return _accumulate(taught, summed, fits=partial(_fits_whole, model))


def _divergence(teacher: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """KL divergence [tokens] of log-probabilities [tokens, kept]; all that is not kept is one more."""
    kept = (teacher.exp() * (teacher - model)).sum(1)
    least = torch.finfo(model.dtype).eps
    own, its = ((1 - each.exp().sum(1)).clamp(min=least) for each in (teacher, model))
    return kept + own * (own.log() - its.log())


def _fits_whole(model: PreTrainedModel, size: BatchSize) -> bool:
    """Whether all logits of a batch's responses are held at once."""
    logits = size.texts * size.response * vocabulary_size(model)
    return size.padded <= BATCH_TOKENS and logits <= BATCH_LOGITS


Row = TypeVar("Row", EncodedSample, Lesson)


def _accumulate(
    rows: Sequence[Row],
    summed: Callable[[Sequence[Row]], torch.Tensor],
    *,
    group: int = 1,
    fits: Callable[[BatchSize], bool] | None = None,
) -> float:
    """Mean over groups of rows of what `summed` sums up over a batch of whole groups."""
    groups = [rows[start : start + group] for start in range(0, len(rows), group)]
    # A group's rows have one prompt.
    lengths = [(len(own[0].prompt_ids), max(len(r.response_ids) for r in own)) for own in groups]
    batches = length_sorted_batches(
        lengths, fits or (lambda size: group * size.padded <= BATCH_TOKENS)
    )
    total = 0.0
    for batch in batches:
        value = summed([row for index in batch for row in groups[index]]) / len(groups)
        value.backward()  # type: ignore[no-untyped-call]
        total += float(value.detach())
    return total


class _Texts(NamedTuple):
    """A batch's prompts and responses, without what all of them begin with, which is in `cache`."""

    ids: torch.Tensor
    """[batch, tokens]; prompts end, and responses begin, at one place."""
    mask: torch.Tensor
    """[batch, tokens, those in `cache` included]."""
    cache: Any
    before: int
    """Tokens before the responses."""

    @classmethod
    def of(cls, model: PreTrainedModel, batch: Sequence[EncodedSample | Lesson]) -> _Texts:
        prompts = [each.prompt_ids for each in batch]
        width = max(len(ids) for ids in prompts)
        after = max(len(each.response_ids) for each in batch)
        shared = shared_length(prompts) if len(batch) > 1 else 0
        if shared < MIN_SHARED or not may_share(model, width + after):
            shared = 0
        before = width - shared
        ids = torch.zeros(len(batch), before + after, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, each in enumerate(batch):
            own = [*each.prompt_ids[shared:], *each.response_ids]
            end = before + len(each.response_ids)
            ids[row, end - len(own) : end] = torch.tensor(own)
            mask[row, end - len(own) : end] = 1
        mask = torch.cat([mask.new_ones(len(batch), shared), mask], dim=1)
        cache = None
        if shared:
            cache = read_once(model, prompts[0][:shared])
            cache.batch_repeat_interleave(len(batch))
        return cls(ids.to(model.device), mask.to(model.device), cache, before)

    @property
    def after(self) -> int:
        """Tokens of the longest response."""
        return self.ids.shape[1] - self.before

    @property
    def positions(self) -> torch.Tensor:
        """Of `ids`, [batch, tokens]."""
        return (self.mask.cumsum(1) - 1).clamp(min=0)[:, -self.ids.shape[1] :]


def _response_logprobs(
    model: PreTrainedModel, batch: Sequence[EncodedSample]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each response, and its number of tokens, [batch]."""
    texts = _Texts.of(model, batch)
    answered = texts.mask[:, -texts.after :]
    logprobs = last_logprobs(
        model, texts.ids, texts.mask, texts.positions, texts.after, cache=texts.cache
    )
    return (logprobs * answered).sum(1), answered.sum(1)


def _next_logprobs(model: PreTrainedModel, batch: Sequence[EncodedSample | Lesson]) -> torch.Tensor:
    """Log-probabilities where each response token is predicted, [batch, longest, vocabulary]."""
    texts = _Texts.of(model, batch)
    # Nothing is predicted after the last token.
    output = run_model(
        model,
        texts.ids[:, :-1],
        texts.mask[:, :-1],
        texts.positions[:, :-1],
        keep=texts.after,
        cache=texts.cache,
        use_cache=texts.cache is not None,
    )
    logits: torch.Tensor = output.logits[:, -texts.after :]
    return logits.float().log_softmax(2)
