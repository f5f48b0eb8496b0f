"""Response-token cross-entropy of a model on samples, and its decision between refusing and helping.

*Sample loss* is the mean negative log-likelihood, in nats a token, of the response's tokens (the
turn's end token included) given the prompt. *Decision margin* is log P(the response opens as a
refusal) - log P(it opens as help): whether a model refuses is settled by its first token, which the
mean over a whole response hides. Both come from one forward pass.

Batches are formed by length and padded to their own longest sample, on the left: responses then end
at the right edge, and the output layer runs over the last few positions only.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mergekit_align.encoding import EncodedSample, ResponseEncoder
from mergekit_align.errors import InputError
from mergekit_align.samples import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 8192
"""Tokens in a batch, padding included."""
BATCH_LOGITS = 2**26
"""Logits in a batch: 256 MiB in float32, whatever the vocabulary."""


class ResponseScore(NamedTuple):
    """What a model makes of one sample."""

    logprob: float
    """Sum of the response tokens' log-probabilities, nats."""
    tokens: int
    """Response tokens, the end token included."""
    decision_margin: float | None
    """log P(opens as a refusal) - log P(opens as help), nats; `None` without openings."""

    @property
    def loss(self) -> float:
        """Sample loss, nats a token."""
        return -self.logprob / self.tokens


class Openings(NamedTuple):
    """First response tokens that tell a refusal from help, each set sorted and disjoint."""

    refusal: tuple[int, ...]
    help: tuple[int, ...]


def opening_ids(
    encoder: ResponseEncoder,
    refusals: Iterable[str],
    helpful: Iterable[str],
    *,
    context: str,
    templated: bool,
) -> Openings:
    """First tokens of refusals and of helpful responses after `context`.

    A token that opens both kinds belongs to the one in which it is relatively more frequent.

    Raises:
        InputError: no token is left that tells one kind from the other.
    """

    def shares(responses: Iterable[str]) -> dict[int, float]:
        counts = Counter(
            encoder.encode(context, response, templated=templated).response_ids[0]
            for response in responses
        )
        return {token: count / counts.total() for token, count in counts.items()}

    refusal, help_ = shares(refusals), shares(helpful)
    found = Openings(
        tuple(sorted(t for t, share in refusal.items() if share > help_.get(t, 0.0))),
        tuple(sorted(t for t, share in help_.items() if share > refusal.get(t, 0.0))),
    )
    if not found.refusal or not found.help:
        raise InputError(
            "openings: found no first token that tells refusals from helpful responses"
        )
    return found


def sample_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    openings: Openings | None = None,
) -> list[ResponseScore]:
    """Scores of chat-templated `samples`, in their order."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    encoder = ResponseEncoder(tokenizer, max_length=window)
    encoded = [
        encoder.encode(encoder.render(s.prompt), s.response, templated=True) for s in samples
    ]
    return response_scores(model, encoded, openings=[openings] * len(encoded))


def response_scores(
    model: PreTrainedModel,
    encoded: Sequence[EncodedSample],
    *,
    openings: Sequence[Openings | None] | None = None,
    max_batch_size: int | None = None,
) -> list[ResponseScore]:
    """Scores of encoded samples, in their order.

    Args:
        openings: for each sample, the openings that its decision margin compares.
        max_batch_size: samples in a batch at most; by default tokens and logits alone bound it.
    """
    if openings is None:
        openings = [None] * len(encoded)
    vocabulary = model.config.get_text_config().vocab_size
    scores: dict[int, ResponseScore] = {}
    for batch in _batches(encoded, vocabulary, max_batch_size):
        logprobs, first = _batch_logprobs(model, [encoded[i] for i in batch])
        for row, index in enumerate(batch):
            margin = _margin(first[row], openings[index])
            tokens = len(encoded[index].response_ids)
            scores[index] = ResponseScore(float(logprobs[row]), tokens, margin)
    return [scores[index] for index in range(len(encoded))]


def _batches(
    encoded: Sequence[EncodedSample], vocabulary: int, max_batch_size: int | None
) -> Iterator[list[int]]:
    """Indices of samples, longest first, as many at a time as the budgets allow and at least one."""

    def length(index: int) -> int:
        return len(encoded[index].prompt_ids) + len(encoded[index].response_ids)

    batch: list[int] = []
    longest_response = 0
    for index in sorted(range(len(encoded)), key=length, reverse=True):
        response = max(longest_response, len(encoded[index].response_ids))
        size = len(batch) + 1
        if batch and (
            size * length(batch[0]) > BATCH_TOKENS
            or size * response * vocabulary > BATCH_LOGITS
            or (max_batch_size is not None and size > max_batch_size)
        ):
            yield batch
            batch, response = [], len(encoded[index].response_ids)
        batch.append(index)
        longest_response = response
    if batch:
        yield batch


@torch.inference_mode()
def _batch_logprobs(
    model: PreTrainedModel, batch: Sequence[EncodedSample]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the responses [batch], and of every first token [batch, vocabulary]."""
    # The last response token is predicted, never read.
    inputs = [(sample.prompt_ids + sample.response_ids)[:-1] for sample in batch]
    width = max(len(ids) for ids in inputs)
    answer_width = max(len(sample.response_ids) for sample in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    targets = torch.full((len(batch), answer_width), -1)
    for row, (sample, row_ids) in enumerate(zip(batch, inputs, strict=True)):
        ids[row, width - len(row_ids) :] = torch.tensor(row_ids)
        mask[row, width - len(row_ids) :] = 1
        targets[row, answer_width - len(sample.response_ids) :] = torch.tensor(sample.response_ids)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    device = model.device
    logits = _last_logits(
        model, ids.to(device), mask.to(device), positions.to(device), answer_width
    )
    targets = targets.to(device)
    answered = targets >= 0
    logprobs = torch.zeros(targets.shape, dtype=torch.float32, device=device)
    chosen = logits[answered].float()
    logprobs[answered] = chosen.gather(1, targets[answered].unsqueeze(1)).squeeze(
        1
    ) - chosen.logsumexp(1)
    first_position = answered.int().argmax(1)
    first = logits[torch.arange(len(batch), device=device), first_position].float().log_softmax(1)
    return logprobs.sum(1).cpu(), first.cpu()


def _last_logits(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    count: int,
) -> torch.Tensor:
    """Logits of the last `count` positions, [batch, count, vocabulary]."""
    accepted = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {"logits_to_keep": count} if "logits_to_keep" in accepted else {}
    if "position_ids" in accepted:
        arguments["position_ids"] = positions
    output = model(input_ids=ids, attention_mask=mask, use_cache=False, **arguments)
    return output.logits[:, -count:]  # type: ignore[no-any-return]


def _margin(first: torch.Tensor, openings: Openings | None) -> float | None:
    if openings is None:
        return None
    refusal = first[list(openings.refusal)].logsumexp(0)
    help_ = first[list(openings.help)].logsumexp(0)
    return float(refusal - help_)
