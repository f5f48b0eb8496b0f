"""Log-probabilities to be differentiated, of which a vocabulary of any size takes bounded memory.

Logits [batch, tokens, vocabulary] and their gradient can outgrow the model: 2,000 predictions over a
vocabulary of 262,144 take 2 GiB in float32, and so does each copy of them. Where they would exceed
`BATCH_LOGITS`, the output layer runs on a piece of the tokens at a time, and again in the backward
pass, which costs one more product with it and holds no logits between the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.checkpoint import checkpoint

from mergekit_align.reading import (
    BATCH_LOGITS,
    chosen_logprobs,
    run_model,
    tokens_at_once,
    vocabulary_size,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def last_logprobs(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    count: int,
    cache: Any = None,
) -> torch.Tensor:
    """Log-probabilities (nats) of the last `count` of `ids`, each after those before it.

    Args:
        ids: token ids [batch, tokens], more than `count`.
        mask: 1 for what is read, 0 for padding [batch, tokens, those in `cache` included].
        positions: of `ids`, [batch, tokens].
        cache: keys and values of what came before.

    Returns:
        [batch, count], differentiable with respect to the model's parameters.
    """
    targets, kept = ids[:, -count:], cache is not None
    whole = targets.numel() * vocabulary_size(model) <= BATCH_LOGITS
    if whole or model.base_model is model:  # the latter cannot be run up to its output layer
        output = run_model(model, ids, mask, positions, keep=count + 1, cache=cache, use_cache=kept)
        return chosen_logprobs(output.logits[:, -count - 1 : -1], targets)
    body = cast("PreTrainedModel", model.base_model)
    output = run_model(body, ids, mask, positions, keep=0, cache=cache, use_cache=kept)
    states = output.last_hidden_state[:, -count - 1 : -1]

    def piece(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = _logits(model, type(output)(last_hidden_state=states))
        # A model that is spread over devices has its output layer on one of them.
        return chosen_logprobs(logits, targets.to(logits.device)).to(targets.device)

    size = tokens_at_once(model, len(ids))
    pieces = [
        checkpoint(piece, *each, use_reentrant=False, preserve_rng_state=False)
        for each in zip(torch.split(states, size, 1), torch.split(targets, size, 1), strict=True)
    ]
    return torch.cat(pieces, dim=1)


def _logits(model: PreTrainedModel, read: Any) -> torch.Tensor:
    """What a model makes of its body's output: its output layer, scaling and capping among it."""
    logits: torch.Tensor = type(model).forward(cast("Any", _AfterBody(model, read))).logits
    return logits


class _AfterBody:
    """A model whose body has run already: all else is the model's own."""

    def __init__(self, model: PreTrainedModel, read: Any) -> None:
        self._model = model
        setattr(self, model.base_model_prefix, lambda *_, **__: read)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
