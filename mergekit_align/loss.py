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

import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mergekit_align.encoding import EncodedSample, ResponseEncoder
from mergekit_align.openings import Openings, TokenIds
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
        prompts = _Prompts(model, [encoded[i].prompt_ids for i in batch])
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


class _Prompts:
    """A batch of prompts that a model has read, ready for continuations."""

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        self._model = model
        width = max(len(ids) for ids in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        self._mask = mask.to(model.device)
        self._lengths = self._mask.sum(1, keepdim=True)
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        output = self._run(ids.to(model.device), self._mask, positions, None, keep=1)
        self._cache = output.past_key_values
        self._first: torch.Tensor = output.logits[:, -1:].float().log_softmax(2)

    @torch.inference_mode()
    def next_tokens(self, continuations: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of every token after each prefix, the empty one first.

        `continuations` [batch, tokens] may be empty; the result is [batch, tokens + 1, vocabulary].
        """
        continuations = continuations.to(self._model.device)
        count = continuations.shape[1]
        if not count:
            return self._first
        mask = torch.cat([self._mask, torch.ones_like(continuations)], dim=1)
        positions = self._lengths + torch.arange(count, device=self._model.device)
        # A forward pass extends the cache that it is given.
        cache = copy.deepcopy(self._cache)
        output = self._run(continuations, mask, positions, cache, keep=count)
        return torch.cat([self._first, output.logits[:, -count:].float().log_softmax(2)], dim=1)

    def logprobs(self, responses: Sequence[Sequence[int]]) -> torch.Tensor:
        """Log-probability of each response's tokens, [batch, longest response], 0 where padded."""
        width = max(len(ids) for ids in responses)
        targets = torch.full((len(responses), width), -1)
        for row, ids in enumerate(responses):
            targets[row, : len(ids)] = torch.tensor(ids)
        # Padding comes after the response, which never looks at it; the last token is never read.
        targets = targets.to(self._model.device)
        after = self.next_tokens(targets[:, :-1].clamp(min=0))
        chosen = after.gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
        return chosen.masked_fill(targets < 0, 0.0).cpu()

    def _run(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any, keep: int
    ) -> Any:
        accepted = inspect.signature(self._model.forward).parameters
        arguments: dict[str, Any] = {"logits_to_keep": keep} if "logits_to_keep" in accepted else {}
        if "position_ids" in accepted:
            arguments["position_ids"] = positions
        # transformers 5.24 renames it.
        arguments["cache" if "cache" in accepted else "past_key_values"] = cache
        return self._model(input_ids=ids, attention_mask=mask, use_cache=True, **arguments)


def _margins(prompts: _Prompts, openings: Sequence[Openings | None]) -> list[float | None]:
    """Decision margin of each prompt; `None` where it has no openings."""
    margins: list[float | None] = [None] * len(openings)
    for kind in set(openings) - {None}:
        assert kind is not None
        every = _decision_margin(prompts, kind, len(openings))
        for row, own in enumerate(openings):
            if own == kind:
                margins[row] = float(every[row])
    return margins


def _decision_margin(prompts: _Prompts, openings: Openings, batch: int) -> torch.Tensor:
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
