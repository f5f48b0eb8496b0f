"""Response-token cross-entropy of a model on samples, and its decision between refusing and helping.

*Sample loss* is the mean negative log-likelihood, in nats a token, of the response's tokens (the
turn's end token included) given the prompt. *Decision margin* is log P(the response opens as a
refusal) - log P(it opens as help): whether a model refuses is settled by its first tokens, which the
mean over a whole response hides.

A batch's prompts are read once, padded on the left to the longest; the responses, and the few
tokens that openings share, continue from their key/value cache; so does a batch from what all of its
prompts begin with. So the output layer runs only where something is predicted, and nothing is read
twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from mergekit_align.checkpoints import context_window
from mergekit_align.encoding import EncodedSample, ResponseEncoder
from mergekit_align.openings import Openings
from mergekit_align.reading import (
    BATCH_LOGITS,
    MIN_SHARED,
    BatchSize,
    Preamble,
    PromptBatch,
    length_sorted_batches,
    may_share,
    shared_beginnings,
    vocabulary_size,
)
from mergekit_align.samples import Sample
from mergekit_align.token_ids import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 8192
"""Tokens in a batch, padding included."""
SMALL_BATCH = {"cpu": 256}
"""Tokens, by device, up to which a batch is worth its padding: a pass takes hardly longer for them."""
MOST_PADDING = 0.2
"""Share of padding in a larger batch."""


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
    window = context_window(model.config)
    encoder = ResponseEncoder(tokenizer, max_length=window)
    encoded = encoder.encode_samples(samples)
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
    reader = ResponseReader(model, encoded, openings=openings, max_batch_size=max_batch_size)
    return reader.scores()


class Batch(NamedTuple):
    """Samples that are read together."""

    indices: list[int]
    shared: list[int]
    """What their prompts begin with, worth reading once; may be nothing."""


class ResponseReader:
    """Scores encoded samples, a batch at a time; arguments as of `response_scores`.

    Args:
        responses: whether the responses are read; without, their log-probabilities are NaN and only
            the decision is told, which the prompt is enough for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoded: Sequence[EncodedSample],
        *,
        openings: Sequence[Openings | None] | None = None,
        max_batch_size: int | None = None,
        responses: bool = True,
    ) -> None:
        self._model = model
        self._responses = responses
        self._encoded = encoded
        self._openings = openings or [None] * len(encoded)
        self._preamble: Preamble | None = None
        self.batches: list[Batch] = list(self._plan(max_batch_size))
        """All samples, each once."""

    def _plan(self, max_batch_size: int | None) -> Iterator[Batch]:
        vocabulary = vocabulary_size(self._model)
        small = SMALL_BATCH.get(self._model.device.type, BATCH_TOKENS)

        def fits(size: BatchSize) -> bool:
            return (
                size.padded <= BATCH_TOKENS
                and (size.padded <= small or size.padded - size.read <= MOST_PADDING * size.padded)
                and size.texts * size.response * vocabulary <= BATCH_LOGITS
                and (max_batch_size is None or size.texts <= max_batch_size)
            )

        prompts = [each.prompt_ids for each in self._encoded]
        for shared, members in shared_beginnings(prompts, MIN_SHARED):
            lengths = [self._encoded[index].lengths for index in members]
            for batch in length_sorted_batches(lengths, fits):
                width = sum(max(lengths[n][part] for n in batch) for part in (0, 1))
                known = shared if may_share(self._model, width) else []
                yield Batch([members[n] for n in batch], known)

    def scores(self) -> list[ResponseScore]:
        """Scores of all samples, in their order, by the model as it is now."""
        self._preamble = None
        scores: dict[int, ResponseScore] = {}
        for batch in self.batches:
            scores |= self.read(batch)
        return [scores[index] for index in range(len(self._encoded))]

    def read(self, batch: Batch) -> dict[int, ResponseScore]:
        """The scores of one batch, by index."""
        if self._preamble is None or self._preamble.ids != batch.shared:
            self._preamble = Preamble(self._model, batch.shared) if batch.shared else None
        chosen = [self._encoded[index] for index in batch.indices]
        prompts = PromptBatch(self._model, [each.prompt_ids for each in chosen], self._preamble)
        logprobs = [math.nan] * len(chosen)
        if self._responses:
            logprobs = prompts.logprobs([each.response_ids for each in chosen]).sum(1).tolist()
        margins = _margins(prompts, [self._openings[index] for index in batch.indices])
        return {
            index: ResponseScore(logprobs[row], len(each.response_ids), margins[row])
            for row, (index, each) in enumerate(zip(batch.indices, chosen, strict=True))
        }


def _margins(prompts: PromptBatch, openings: Sequence[Openings | None]) -> list[float | None]:
    """Decision margin of each prompt; `None` where it has no openings."""
    margins: list[float | None] = [None] * len(openings)
    for kind in set(openings) - {None}:
        assert kind is not None
        every: list[float] = _decision_margin(prompts, kind).tolist()
        for row, own in enumerate(openings):
            if own == kind:
                margins[row] = every[row]
    return margins


def _decision_margin(prompts: PromptBatch, openings: Openings) -> torch.Tensor:
    """log P(opens as a refusal) - log P(opens as help) after every prompt, [batch]."""
    wanted: dict[TokenIds, list[int]] = {}
    for opening in dict.fromkeys([*openings.refusal, *openings.help]):
        for n, token in enumerate(opening):
            if token not in wanted.setdefault(opening[:n], []):
                wanted[opening[:n]].append(token)
    found = {
        (*place, token): own
        for place, rows in prompts.branches(wanted).items()
        for token, own in zip(wanted[place], rows.unbind(1), strict=True)
    }

    def logprob(kind: Sequence[TokenIds]) -> torch.Tensor:
        each = [sum(found[opening[: n + 1]] for n in range(len(opening))) for opening in kind]
        return torch.stack(each).logsumexp(0)  # type: ignore[arg-type]

    return logprob(openings.refusal) - logprob(openings.help)
