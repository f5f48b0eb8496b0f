"""Response-token cross-entropy of a model on samples, and its decision between refusing and helping.

*Sample loss* is the mean negative log-likelihood, in nats a token, of the response's tokens (the
turn's end token included) given the prompt. *Decision margin* is log P(the response opens as a
refusal) - log P(it opens as help): whether a model refuses is settled by its first tokens, which the
mean over a whole response hides.

Prompts, responses and the few tokens that openings share are read as `trees`, each beginning once, and
the output layer runs only where something is predicted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from mergekit_align.checkpoints import context_window
from mergekit_align.encoding import EncodedSample, ResponseEncoder
from mergekit_align.openings import Openings
from mergekit_align.output_layer import continuation_logprobs
from mergekit_align.reading import BATCH_LOGITS, Preamble, vocabulary_size
from mergekit_align.samples import Sample
from mergekit_align.trees import Budget, Query, TreeBatch, plan_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 8192
"""Tokens in a batch, padding included."""


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
        max_batch_size: trees in a batch at most; by default tokens and logits alone bound it.
    """
    asked = questions(encoded, openings)
    return ResponseReader(model, asked, max_batch_size=max_batch_size).scores()


class Question(NamedTuple):
    """What is asked of a model about one sample."""

    query: Query
    tokens: int
    """Of the response."""
    openings: Openings | None
    """That the decision margin compares."""
    reads_response: bool
    """Without, its log-probability is NaN; the prompt is enough for a decision."""


def questions(
    encoded: Sequence[EncodedSample],
    openings: Sequence[Openings | None] | None = None,
    *,
    responses: bool = True,
) -> list[Question]:
    """One about each sample.

    Args:
        openings: of each sample; none where no decision is asked for.
        responses: whether responses are read where there are openings.
    """
    found = []
    for (prompt, response), kinds in zip(encoded, openings or [None] * len(encoded), strict=True):
        reads = responses or kinds is None
        continuations = [*([response] if reads else []), *(kinds.every if kinds else [])]
        found.append(Question(Query(prompt, continuations), len(response), kinds, reads))
    return found


class ResponseReader:
    """Answers questions, a batch at a time.

    Args:
        max_batch_size: trees in a batch at most; by default tokens and logits alone bound it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        asked: Sequence[Question],
        *,
        max_batch_size: int | None = None,
    ) -> None:
        self._model = model
        self._asked = asked
        self._preamble: Preamble | None = None
        budget = Budget(BATCH_TOKENS, BATCH_LOGITS // vocabulary_size(model), max_batch_size)
        queries = [each.query for each in asked]
        self.batches: list[TreeBatch] = list(plan_batches(model, queries, budget, padded=True))
        """All samples, each once."""

    def scores(self) -> list[ResponseScore]:
        """Scores of all samples, in their order, by the model as it is now."""
        self._preamble = None
        scores: dict[int, ResponseScore] = {}
        for batch in self.batches:
            scores |= self.read(batch)
        return [scores[index] for index in range(len(self._asked))]

    @torch.inference_mode()
    def read(self, batch: TreeBatch) -> dict[int, ResponseScore]:
        """The scores of one batch, by index."""
        if self._preamble is None or self._preamble.ids != batch.shared:
            self._preamble = Preamble(self._model, batch.shared) if batch.shared else None
        cache = self._preamble.cache(len(batch.ids)) if self._preamble else None
        logprobs = continuation_logprobs(self._model, batch, cache, whole=False).cpu()
        values = logprobs.tolist()
        scores: dict[int, ResponseScore] = {}
        decided: dict[Openings, list[tuple[int, int]]] = {}
        start = 0
        for index in batch.queries:
            _, tokens, kinds, reads_response = self._asked[index]
            logprob = math.nan
            if reads_response:
                logprob = values[start]
                start += 1
            if kinds is not None:
                decided.setdefault(kinds, []).append((index, start))
                start += len(kinds.every)
            scores[index] = ResponseScore(logprob, tokens, None)
        for kinds, places in decided.items():
            firsts = torch.tensor([first for _, first in places]).unsqueeze(1)
            own = logprobs[firsts + torch.arange(len(kinds.every))]
            for (index, _), margin in zip(places, kinds.margins(own).tolist(), strict=True):
                scores[index] = scores[index]._replace(decision_margin=margin)
        return scores
