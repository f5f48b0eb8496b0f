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
from functools import cached_property
from itertools import starmap
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mergekit_align.checkpoints import context_window
from mergekit_align.encoding import EncodedSample, ResponseEncoder
from mergekit_align.openings import Openings
from mergekit_align.output_layer import continuation_logprobs
from mergekit_align.parallel import Readers, readers_of
from mergekit_align.reading import BATCH_LOGITS, Preamble, vocabulary_size
from mergekit_align.samples import Sample
from mergekit_align.trees import Budget, Query, TreeBatch, plan_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Array = NDArray[np.float64]

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


class ResponseScores(NamedTuple):
    """What a model makes of samples: the same, of all of them."""

    logprobs: Array
    """NaN where the response was not read, [samples]."""
    tokens: Array
    """[samples]"""
    margins: Array
    """NaN without openings, [samples]."""

    @classmethod
    def of(cls, scores: Sequence[ResponseScore]) -> ResponseScores:
        """Those of some samples."""
        return cls(*np.array(scores, dtype=np.float64).T)

    @classmethod
    def nothing(cls, count: int) -> ResponseScores:
        """To be filled in."""
        return cls(*np.full((3, count), np.nan))

    def each(self) -> list[ResponseScore]:
        """Of one sample after another."""
        margins = (None if math.isnan(each) else each for each in self.margins.tolist())
        logprobs, tokens = self.logprobs.tolist(), map(int, self.tokens.tolist())
        return [*starmap(ResponseScore, zip(logprobs, tokens, margins, strict=True))]


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
    return ResponseReader(model, asked, max_batch_size=max_batch_size).scores().each()


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


class _Answers(NamedTuple):
    """Which of a batch's continuations answer its questions."""

    tokens: Array
    """Of each question's response, [questions]."""
    read: list[int]
    """Questions whose responses are read."""
    responses: torch.Tensor
    """These, [read]."""
    decisions: list[tuple[Openings, list[int], torch.Tensor]]
    """Questions that ask for a decision, by what it compares, and these [questions, openings]."""

    @classmethod
    def of(cls, asked: Sequence[Question]) -> _Answers:
        read, responses, start = [], [], 0
        decisions: dict[Openings, tuple[list[int], list[int]]] = {}
        for index, (_, _, kinds, reads_response) in enumerate(asked):
            if reads_response:
                read.append(index)
                responses.append(start)
                start += 1
            if kinds is not None:
                members, firsts = decisions.setdefault(kinds, ([], []))
                members.append(index)
                firsts.append(start)
                start += len(kinds.every)
        return cls(
            np.array([each.tokens for each in asked], dtype=np.float64),
            read,
            torch.tensor(responses, dtype=torch.long),
            [
                (kinds, members, torch.tensor(firsts)[:, None] + torch.arange(len(kinds.every)))
                for kinds, (members, firsts) in decisions.items()
            ],
        )

    def scores(self, logprobs: torch.Tensor) -> ResponseScores:
        """By the continuations' log-probabilities, [continuations]."""
        found = ResponseScores.nothing(len(self.tokens))
        found.tokens[:] = self.tokens
        found.logprobs[self.read] = logprobs[self.responses].numpy()
        for kinds, members, openings in self.decisions:
            found.margins[members] = kinds.margins(logprobs[openings]).numpy()
        return found


class ResponseReader:
    """Answers questions, a batch at a time, or several on a CPU.

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
        self._count = len(asked)
        self._preamble: Preamble | None = None
        budget = Budget(BATCH_TOKENS, BATCH_LOGITS // vocabulary_size(model), max_batch_size)
        queries = [each.query for each in asked]
        readers = readers_of(model)
        self.batches: list[TreeBatch] = list(
            plan_batches(model, queries, budget, padded=True, at_once=readers)
        )
        """All samples, each once."""
        self._at_once = min(readers, sum(batch.blocks is not None for batch in self.batches))
        self._answers = [
            _Answers.of([asked[index] for index in batch.queries]) for batch in self.batches
        ]

    def scores(self) -> ResponseScores:
        """Of all samples, in their order, by the model as it is now."""
        self._preamble = None
        found = ResponseScores.nothing(self._count)
        numbers = range(len(self.batches))
        several = self._at_once > 1 and readers_of(self._model) > 1
        parts = self._readers.map(self._read, numbers) if several else map(self.read, numbers)
        for batch, part in zip(self.batches, parts, strict=True):
            for whole, own in zip(found, part, strict=True):
                whole[batch.queries] = own
        return found

    def read(self, number: int) -> ResponseScores:
        """Of the samples of one batch, in the order of its queries."""
        return self._read(self._model, number)

    @cached_property
    def _readers(self) -> Readers:
        return Readers(self._model, self._at_once)

    @torch.inference_mode()
    def _read(self, model: PreTrainedModel, number: int) -> ResponseScores:
        batch = self.batches[number]
        if self._preamble is None or self._preamble.ids != batch.shared:
            self._preamble = Preamble(model, batch.shared) if batch.shared else None
        cache = self._preamble.cache(len(batch.ids)) if self._preamble else None
        logprobs = continuation_logprobs(model, batch, cache, whole=False).cpu()
        return self._answers[number].scores(logprobs)
