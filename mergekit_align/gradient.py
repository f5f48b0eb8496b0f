"""How likely a model finds responses, and how it decides, as something to differentiate.

For a merge that is linear in its weights one backward pass is enough for all of them: a weight's
gradient is the inner product of the parameters' gradient with the model that it scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from mergekit_align.encoding import EncodedSample
from mergekit_align.openings import Openings
from mergekit_align.output_layer import last_logprobs
from mergekit_align.reading import (
    BATCH_LOGITS,
    MIN_SHARED,
    BatchSize,
    cache_of,
    length_sorted_batches,
    may_share,
    read_once,
    run_model,
    shared_length,
    vocabulary_size,
)
from mergekit_align.token_ids import TokenIds

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
    branches = openings.branches()
    # With what is read after each prompt, so that batches are as large as they may be.
    rows = [EncodedSample(each.prompt_ids, [*chain(*branches)]) for each in encoded]

    def summed(batch: Sequence[EncodedSample]) -> torch.Tensor:
        after = _branch_logprobs(model, batch, branches)

        def logprob(kind: Sequence[TokenIds]) -> torch.Tensor:
            each = [
                torch.stack([after[o[:n]][:, token] for n, token in enumerate(o)]).sum(0)
                for o in kind
            ]
            return torch.stack(each).logsumexp(0)

        odds = logprob(openings.refusal) - logprob(openings.help)
        odds = odds if refusal_wanted else -odds
        return (odds if margin else torch.nn.functional.logsigmoid(odds)).sum()

    return _accumulate(rows, summed)


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
    fits: Callable[[BatchSize], bool] = lambda size: size.padded <= BATCH_TOKENS,
) -> float:
    """Mean over rows of what `summed` sums up over a batch of them."""
    total = 0.0
    lengths = [(len(row.prompt_ids), len(row.response_ids)) for row in rows]
    for batch in length_sorted_batches(lengths, fits):
        value = summed([rows[index] for index in batch]) / len(rows)
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
    def of(
        cls,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]] | None = None,
        *,
        further: int = 0,
    ) -> _Texts:
        """Without responses, prompts alone, after which `further` tokens will be read."""
        responses = responses or [()] * len(prompts)
        width = max(len(ids) for ids in prompts)
        after = max(len(ids) for ids in responses)
        shared = shared_length(prompts) if len(prompts) > 1 else 0
        if shared < MIN_SHARED or not may_share(model, width + after + further):
            shared = 0
        before = width - shared
        ids = torch.zeros(len(prompts), before + after, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            own = [*prompt[shared:], *response]
            end = before + len(response)
            ids[row, end - len(own) : end] = torch.tensor(own)
            mask[row, end - len(own) : end] = 1
        mask = torch.cat([mask.new_ones(len(prompts), shared), mask], dim=1)
        cache = None
        if shared:
            cache = read_once(model, prompts[0][:shared])
            cache.batch_repeat_interleave(len(prompts))
        return cls(ids.to(model.device), mask.to(model.device), cache, before)

    @property
    def after(self) -> int:
        """Tokens of the longest response."""
        return self.ids.shape[1] - self.before

    @property
    def positions(self) -> torch.Tensor:
        """Of `ids`, [batch, tokens]."""
        return (self.mask.cumsum(1) - 1).clamp(min=0)[:, -self.ids.shape[1] :]


def _texts(model: PreTrainedModel, batch: Sequence[EncodedSample | Lesson]) -> _Texts:
    return _Texts.of(model, [e.prompt_ids for e in batch], [e.response_ids for e in batch])


def _response_logprobs(
    model: PreTrainedModel, batch: Sequence[EncodedSample]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each response, and its number of tokens, [batch]."""
    texts = _texts(model, batch)
    answered = texts.mask[:, -texts.after :]
    logprobs = last_logprobs(
        model, texts.ids, texts.mask, texts.positions, texts.after, cache=texts.cache
    )
    return (logprobs * answered).sum(1), answered.sum(1)


def _next_logprobs(model: PreTrainedModel, batch: Sequence[EncodedSample | Lesson]) -> torch.Tensor:
    """Log-probabilities where each response token is predicted, [batch, longest, vocabulary]."""
    texts = _texts(model, batch)
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


def _branch_logprobs(
    model: PreTrainedModel, batch: Sequence[EncodedSample], branches: Sequence[TokenIds]
) -> dict[TokenIds, torch.Tensor]:
    """Log-probabilities of what follows each prompt and each beginning of a branch after it.

    A prompt is read once; the branches go on from there.

    Returns:
        By beginning, the empty one too, [batch, vocabulary].
    """
    longest = max((len(branch) for branch in branches), default=0)
    texts = _Texts.of(model, [each.prompt_ids for each in batch], further=longest)
    output = run_model(
        model,
        texts.ids,
        texts.mask,
        texts.positions,
        keep=1,
        cache=texts.cache,
        use_cache=bool(branches) or texts.cache is not None,
    )
    after: dict[TokenIds, torch.Tensor] = {(): output.logits[:, -1].float().log_softmax(1)}
    if not branches:
        return after
    width, cache = len(branches), cache_of(output)
    cache.batch_repeat_interleave(width)
    padded = torch.tensor([[*branch, *[0] * (longest - len(branch))] for branch in branches])
    ids = padded.repeat(len(batch), 1).to(model.device)
    mask = texts.mask.repeat_interleave(width, 0)
    positions = mask.sum(1, keepdim=True) + torch.arange(longest, device=ids.device)
    mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    output = run_model(model, ids, mask, positions, keep=longest, cache=cache)
    following = output.logits[:, -longest:].float().log_softmax(2)
    for index, branch in enumerate(branches):
        for length in range(1, len(branch) + 1):
            after[branch[:length]] = following[index::width, length - 1]
    return after
