"""What follows the texts of a batch of trees, of which a vocabulary of any size takes bounded memory.

The output layer runs only where something is predicted, and so may the last layer after its attention.

Logits [predictions, vocabulary] and their gradient can outgrow the model: 2,000 predictions over a
vocabulary of 262,144 take 2 GiB in float32, and so does each copy of them. Where they would exceed
`BATCH_LOGITS`, the output layer runs on a piece of the predictions at a time, and again in the backward
pass, which costs one more product with it and holds no logits between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from mergekit_align.attention import block_attention
from mergekit_align.reading import BATCH_LOGITS, body_of, run_model, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mergekit_align.trees import TreeBatch

CACHED_LOGITS = 2**18
"""Logits that the cache of a processor's core holds in float32."""


def continuation_logprobs(
    model: PreTrainedModel, batch: TreeBatch, cache: Any = None, *, whole: bool = True
) -> torch.Tensor:
    """Log-probability (nats) of each continuation of a batch's queries, [continuations].

    Differentiable with respect to the model's parameters, where gradients are on.

    Args:
        cache: keys and values of what the batch's prompts share, for each row.
        whole: whether all tokens go through all of the model, as who watches its layers expects; the
            last layer else leaves out those where nothing is predicted.
    """
    states, logits_of = _read(model, batch, cache, whole=whole)
    asked, order = batch.asked.sort(stable=True)

    def piece(states: torch.Tensor, asked: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits = logits_of(states)
        # A model that is spread over devices has its output layer on one of them.
        own = asked.to(logits.device), tokens.to(logits.device)
        found = [
            rows.float().log_softmax(1)[row, token]
            for rows, row, token in _pieces(logits, *own, _cached_rows(logits))
        ]
        return torch.cat(found).to(tokens.device)

    size = max(1, BATCH_LOGITS // vocabulary_size(model))
    pieces = list(_pieces(states, asked, batch.tokens[order], size))
    if len(pieces) == 1:
        found = piece(*pieces[0])
    else:
        found = torch.cat(
            [
                checkpoint(piece, *each, use_reentrant=False, preserve_rng_state=False)
                for each in pieces
            ]
        )
    return found.new_zeros(batch.continuations).index_add(0, batch.owners[order], found)


def _pieces(
    rows: torch.Tensor, asked: torch.Tensor, tokens: torch.Tensor, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """`size` rows at a time, with what is asked of them.

    Args:
        asked: the row in which each of `tokens` is looked up, in ascending order.
    """
    firsts = torch.arange(0, len(rows), size, device=asked.device)
    places = torch.searchsorted(asked, firsts).tolist()
    for first, part, start, end in zip(
        firsts.tolist(), torch.split(rows, size), places, [*places[1:], len(asked)], strict=True
    ):
        yield part, asked[start:end] - first, tokens[start:end]


def _cached_rows(logits: torch.Tensor) -> int:
    """Rows of `logits` that are worked on at a time, so that on a CPU they stay in its caches."""
    if logits.device.type != "cpu":
        return len(logits)
    return max(1, torch.get_num_threads() * CACHED_LOGITS // logits.shape[1])


def next_logprobs(model: PreTrainedModel, batch: TreeBatch, cache: Any = None) -> torch.Tensor:
    """Log-probabilities of every token where those of the continuations are predicted.

    Arguments as of `continuation_logprobs`; the last layer leaves out what nothing is predicted from.

    Returns:
        [asked, vocabulary], of all at once.
    """
    states, logits_of = _read(model, batch, cache, whole=False)
    return logits_of(states).float().log_softmax(1)[batch.asked]


def _read(
    model: PreTrainedModel, batch: TreeBatch, cache: Any, *, whole: bool = True
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """States of a batch's predictions [predictions, width], and what gives the logits of some."""

    def run(model: PreTrainedModel) -> Any:
        kept = cache is not None
        with ExitStack() as reading:
            if batch.ends is not None and not whole:
                reading.enter_context(_last_layer_at(model, batch.places))
            if batch.blocks is not None:
                mask = reading.enter_context(block_attention(model, batch.blocks))
            else:
                mask = batch.mask(model)
            return run_model(
                model, batch.ids, mask, batch.positions, keep=0, cache=cache, use_cache=kept
            )

    body = body_of(model)
    if body is model:  # it cannot be run up to its output layer
        with _predicting(model, batch.places):
            return run(model).logits.squeeze(0), lambda logits: logits
    output = run(body)
    states = output.last_hidden_state.flatten(0, 1)
    states = states[batch.places.to(states.device)]

    def logits_of(states: torch.Tensor) -> torch.Tensor:
        read = type(output)(last_hidden_state=states.unsqueeze(0))
        logits: torch.Tensor = type(model).forward(cast("Any", _AfterBody(model, read))).logits
        return logits.squeeze(0)

    return states, logits_of


@contextmanager
def _last_layer_at(model: PreTrainedModel, places: torch.Tensor) -> Iterator[None]:
    """Have what follows the last layer's attention run on some places alone, of rows joined end to end.

    Zeros stand for the rest, which nothing reads.
    """
    layers = getattr(model, "layers", ())
    last = layers[-1] if layers else None
    attention = getattr(last, "self_attn", None)
    modules = getattr(attention, "o_proj", None), getattr(last, "mlp", None)
    hooks = [hook for each in modules if each is not None for hook in _restrict(each, places)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _restrict(module: torch.nn.Module, places: torch.Tensor) -> list[RemovableHandle]:
    """Have a module that works on each token by itself leave out all but those at `places`."""
    rows = torch.Size()

    def select(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal rows
        states, *others = inputs
        rows = states.shape[:2]
        return (states.flatten(0, 1)[places.to(states.device)].unsqueeze(0), *others)

    def put_back(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # of experts, which say what they chose too
            return (put_back(_, __, output[0]), *output[1:])
        whole = output.new_zeros(rows.numel(), output.shape[-1])
        whole[places.to(output.device)] = output.squeeze(0)
        return whole.view(*rows, -1)

    return [module.register_forward_pre_hook(select), module.register_forward_hook(put_back)]


@contextmanager
def _predicting(model: PreTrainedModel, places: torch.Tensor) -> Iterator[None]:
    """Have the output layer run on some places alone, of the rows joined end to end."""
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: (inputs[0].flatten(0, 1)[places].unsqueeze(0), *inputs[1:])
    )
    try:
        yield
    finally:
        hook.remove()


class _AfterBody:
    """A model whose body has run already: all else is the model's own."""

    def __init__(self, model: PreTrainedModel, read: Any) -> None:
        self._model = model
        setattr(self, model.base_model_prefix, lambda *_, **__: read)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
