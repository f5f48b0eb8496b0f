"""Response-token cross-entropy of a model on samples, and its decision between refusing and helping.

*Sample loss* is the mean negative log-likelihood, in nats a token, of the response's tokens (the
turn's end token included) given the prompt. *Decision margin* is log P(the response opens as a
refusal) - log P(it opens as help): whether a model refuses is settled by its first tokens, which the
mean over a whole response hides.

A batch's prompts are read once, padded on the left to the longest; the responses, and the few
tokens that openings share, continue from their key/value cache. So the output layer runs only where
something is predicted, and nothing is read twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from mergekit_align.encoding import EncodedSample, ResponseEncoder
from mergekit_align.openings import Openings, TokenIds
from mergekit_align.reading import PromptBatch
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


def sample_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    openings: Openings | None = None,
    max_batch_size: int | None = None,
) -> list[ResponseScore]:
    """Scores of chat-templated `samples`, in their order."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    encoder = ResponseEncoder(tokenizer, max_length=window)
    encoded = [
        encoder.encode(encoder.render(s.prompt), s.response, templated=True) for s in samples
    ]
    return response_scores(
        model, encoded, openings=[openings] * len(encoded), max_batch_size=max_batch_size
    )


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
        prompts = PromptBatch(model, [encoded[i].prompt_ids for i in batch])
        responses = [encoded[i].response_ids for i in batch]
        logprobs = prompts.logprobs(responses).sum(1)
        margins = _margins(prompts, [openings[i] for i in batch])
        for row, index in enumerate(batch):
            tokens = len(encoded[index].response_ids)
            scores[index] = ResponseScore(float(logprobs[row]), tokens, margins[row])
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


def _margins(prompts: PromptBatch, openings: Sequence[Openings | None]) -> list[float | None]:
    """Decision margin of each prompt; `None` where it has no openings."""
    margins: list[float | None] = [None] * len(openings)
    for kind in set(openings) - {None}:
        assert kind is not None
        every = _decision_margin(prompts, kind, len(openings))
        for row, own in enumerate(openings):
            if own == kind:
                margins[row] = float(every[row])
    return margins


def _decision_margin(prompts: PromptBatch, openings: Openings, batch: int) -> torch.Tensor:
    """log P(opens as a refusal) - log P(opens as help) after every prompt, [batch]."""
    after: dict[TokenIds, torch.Tensor] = {}
    for beginning in [(), *openings.shared_beginnings()]:
        read = torch.tensor(beginning, dtype=torch.long).expand(batch, -1)
        following = prompts.next_tokens(read)
        after |= {beginning[:n]: following[:, n] for n in range(len(beginning) + 1)}

    def logprob(kind: Sequence[TokenIds]) -> torch.Tensor:
        each = [
            sum(after[opening[:n]][:, token] for n, token in enumerate(opening)) for opening in kind
        ]
        return torch.stack(each).logsumexp(0)  # type: ignore[arg-type]

    return (logprob(openings.refusal) - logprob(openings.help)).cpu()
