"""A model reads a batch of prompts once; whatever may follow continues from their key/value cache.

Prompts are padded on the left to the batch's longest, so that the output layer runs only where
something is predicted. What all of them begin with (a guard's policy, a shared system prompt) is a
`Preamble`: read once, by itself, and shared by every batch.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from mergekit_align.token_ids import TokenIds, longest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


BATCH_LOGITS = 2**26
"""Logits that are held at once: 256 MiB in float32, whatever the vocabulary."""
MIN_SHARED = 16
"""Tokens that prompts must share for these to be read by themselves, such as a system prompt."""


def may_share(model: PreTrainedModel, tokens: int) -> bool:
    """Whether texts of up to so many tokens, padding included, may share what they begin with.

    Padding then lies between that and the rest, and a layer with a sliding window or chunks counts it
    as tokens: it would see less than of the text alone.
    """
    config = model.config.get_text_config()
    windows = [getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size")]
    return all(window is None or tokens <= window for window in windows)


def read_once(model: PreTrainedModel, ids: Sequence[int]) -> Any:
    """The key/value cache of one text, differentiable where gradients are on."""
    rows = torch.tensor([list(ids)], device=model.device)
    positions = torch.arange(len(ids), device=model.device).unsqueeze(0)
    return cache_of(run_model(model, rows, torch.ones_like(rows), positions, keep=1))


class Preamble:
    """Token ids that prompts begin with, read once."""

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, ids: Sequence[int]) -> None:
        self.ids = list(ids)
        self._cache = read_once(model, self.ids)

    def begins(self, prompt: Sequence[int]) -> bool:
        """Whether `prompt` begins with these ids and goes on after them."""
        return len(prompt) > len(self.ids) and list(prompt[: len(self.ids)]) == self.ids

    def cache(self, batch: int) -> Any:
        """A key/value cache of its own for each of `batch` prompts."""
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(batch)
        return cache


class PromptBatch:
    """A batch of prompts that a model has read, ready for continuations.

    Args:
        prompts: token ids of each, at least one.
        preamble: what every prompt begins with, where it has been read already.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        preamble: Preamble | None = None,
    ) -> None:
        self._model = model
        known = len(preamble.ids) if preamble else 0
        width = max(len(ids) for ids in prompts)
        padding = [width - len(ids) for ids in prompts]
        ids = torch.tensor(
            [[0] * pad + list(own[known:]) for pad, own in zip(padding, prompts, strict=True)]
        )
        mask = torch.tensor(
            [[1] * known + [0] * pad + [1] * (width - known - pad) for pad in padding]
        )
        self._mask = mask.to(model.device)
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, known:]
        cache = preamble.cache(len(prompts)) if preamble else None
        output = run_model(model, ids.to(model.device), self._mask, positions, keep=1, cache=cache)
        self._cache = cache_of(output)
        self.first: torch.Tensor = output.logits[:, -1:].float().log_softmax(2)
        """Log-probabilities of the token after each prompt, [batch, 1, vocabulary]."""

    @torch.inference_mode()
    def next_tokens(self, continuations: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of every token after each prefix, the empty one first.

        `continuations` [batch, tokens] may be empty; the result is [batch, tokens + 1, vocabulary].
        """
        count = continuations.shape[1]
        if not count:
            return self.first
        # A forward pass extends the cache that it is given.
        logits, _ = self._continue(continuations, self._mask, copy.deepcopy(self._cache))
        return torch.cat([self.first, logits.float().log_softmax(2)], dim=1)

    def branches(self, wanted: Mapping[TokenIds, Sequence[int]]) -> dict[TokenIds, torch.Tensor]:
        """Log-probabilities of the tokens wanted after each continuation, [batch, tokens]."""
        found: dict[TokenIds, torch.Tensor] = {}
        for place in longest(wanted):
            read = torch.tensor(place, dtype=torch.long).expand(len(self._mask), -1)
            following = self.next_tokens(read)
            for n in range(len(place) + 1):
                if place[:n] in wanted and place[:n] not in found:
                    # Copied out, so that the whole vocabulary's are not kept for every place.
                    found[place[:n]] = following[:, n, list(wanted[place[:n]])]
        return found

    @torch.inference_mode()
    def greedy(self, max_tokens: int, stop: int | None) -> list[list[int]]:
        """The likeliest continuation of each prompt, up to `stop`, which is left out.

        Uses up the batch: nothing can be read after it.
        """
        mask, after, written = self._mask, self.first, []
        done = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
        for _ in range(max_tokens):
            written.append(after[:, -1].argmax(1, keepdim=True))
            done |= written[-1].squeeze(1) == (-1 if stop is None else stop)
            if len(written) == max_tokens or bool(done.all()):
                break
            after, mask = self._continue(written[-1], mask, self._cache)
        rows = torch.cat(written, dim=1).tolist()
        return [row[: row.index(stop)] if stop in row else row for row in rows]

    def _continue(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits after each of `ids`, and the mask that covers them."""
        ids = ids.to(self._model.device)
        count = ids.shape[1]
        positions = mask.sum(1, keepdim=True) + torch.arange(count, device=ids.device)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        output = run_model(self._model, ids, mask, positions, keep=count, cache=cache)
        return output.logits[:, -count:], mask


def vocabulary_size(model: PreTrainedModel) -> int:
    """Logits of one token."""
    size: int = model.config.get_text_config().vocab_size
    return size


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model up to its output layer; all of it where it cannot be run so far, as of a wrapper."""
    from transformers import PreTrainedModel

    return model.base_model if isinstance(model, PreTrainedModel) else model


def cache_of(output: Any) -> Any:
    """The key/value cache of a forward pass."""
    # transformers 5.24 renames it.
    return output.cache if "cache" in output else output.past_key_values


def run_model(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    *,
    keep: int,
    cache: Any = None,
    use_cache: bool = True,
) -> Any:
    """A forward pass with logits of the last `keep` tokens, as far as the model can leave out others.

    Args:
        ids: token ids [batch, tokens].
        mask: 1 for what is read, 0 for padding [batch, tokens, those in `cache` included].
        positions: of `ids`, [batch, tokens].
        cache: keys and values of what came before; extended in place.
    """
    accepted = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {"logits_to_keep": keep} if "logits_to_keep" in accepted else {}
    if "position_ids" in accepted:
        arguments["position_ids"] = positions
    if use_cache:
        arguments["cache" if "cache" in accepted else "past_key_values"] = cache
    with _one_product(model):
        return model(input_ids=ids, attention_mask=mask, use_cache=use_cache, **arguments)


@contextmanager
def _one_product(model: PreTrainedModel) -> Iterator[None]:
    """Have the output layer multiply the kept tokens of all texts at once.

    They lie apart in memory, and PyTorch would copy the layer's weights for every text, unless these
    are to have a gradient.
    """
    layer = None if torch.is_grad_enabled() else model.get_output_embeddings()
    if layer is None:
        yield
        return
    hook = layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()
