"""Attention of texts that share what they begin with, on a CPU, as products of blocks of tokens.

All texts of a batch are one row (see `trees`), of which a token sees few others: those that lead to it.
Of `BLOCK` tokens, one after another, the first one's path and the block itself hold all that any of
them sees, so that a block's scores are as many as its texts are long, whatever the row is.

PyTorch's fused kernel never holds the scores of attention, which matters on a GPU. On a CPU it takes
twice as long as plain products, and up to seven times as long in its backward pass, as long as the
scores fit the caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 32
"""Tokens that are looked up together in what any of them sees."""
MOST_SCORES = 2**24
"""Scores that are held at once, 32 MiB in bfloat16, or kept in one layer for its backward pass."""
KEPT_MASKS = 2**20
"""Numbers of a row's masks that are kept from reading to reading."""
_OTHERS = "position_bias", "softcap", "s_aux"  # what else some models have done to the scores
_FUSED, _BLOCKS = "sdpa", "mergekit_align_blocks"


class Group(NamedTuple):
    """Blocks of a row that see about as many tokens."""

    blocks: torch.Tensor
    """Which of the row's they are, [blocks]."""
    keys: torch.Tensor
    """Places of the tokens that they may see, in ascending order, [blocks, keys]."""
    ends: torch.Tensor
    """The last place that sees each of these, -1 where it only fills up the row, [blocks, keys]."""

    @property
    def seen(self) -> torch.Tensor:
        """Whether a token sees each of its block's keys, [blocks, `BLOCK`, keys]."""
        reader = self.blocks.unsqueeze(1) * BLOCK + torch.arange(BLOCK)
        reader = reader.unsqueeze(2)
        return (self.keys.unsqueeze(1) <= reader) & (reader <= self.ends.unsqueeze(1))


@dataclass(frozen=True, eq=False)
class Blocks:
    """How a row is read."""

    groups: list[Group]
    blocks: torch.Tensor
    """Those of all groups, one after another, [blocks]."""
    order: torch.Tensor
    """Places of the row's blocks among these, [blocks]."""
    ends: torch.Tensor
    """The last place that sees each token, [tokens]."""
    _masks: dict[torch.dtype, list[torch.Tensor]] = field(default_factory=dict)

    @torch.inference_mode(False)
    def masks(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """What is added to the scores of each group, [blocks, 1, `BLOCK`, keys]; kept if small."""
        if dtype in self._masks:
            return self._masks[dtype]
        masks = [to_add(group.seen, dtype).unsqueeze(1) for group in self.groups]
        if sum(each.numel() for each in masks) <= KEPT_MASKS:
            self._masks[dtype] = masks
        return masks

    @classmethod
    def of(cls, ends: NDArray[np.int64]) -> Blocks:
        """Of a row by its tokens' `ends`: a token is seen by all from itself to there."""
        paths: dict[int, list[tuple[int, NDArray[np.int64]]]] = {}
        for start in range(0, len(ends), BLOCK):
            path = np.flatnonzero(ends[:start] >= start)
            paths.setdefault(_width(len(path) + BLOCK), []).append((start, path))
        groups = [_group(width, own, ends) for width, own in sorted(paths.items())]
        blocks = torch.cat([group.blocks for group in groups])
        return cls(groups, blocks, blocks.argsort(), torch.from_numpy(ends))


def _width(keys: int) -> int:
    """As many or some more: few widths make few groups, and products of such are fast."""
    width = 2 * BLOCK
    while width < keys:
        width = width * 4 // 3 if width % 3 == 0 else width * 3 // 2
    return width


def _group(
    width: int, paths: list[tuple[int, NDArray[np.int64]]], ends: NDArray[np.int64]
) -> Group:
    starts = np.array([start for start, _ in paths])
    keys = np.zeros((len(paths), width), dtype=np.int64)
    last = np.full_like(keys, -1)
    for row, (start, path) in enumerate(paths):
        seen = np.concatenate([path, np.arange(start, min(start + BLOCK, len(ends)))])
        keys[row, : len(seen)] = seen
        last[row, : len(seen)] = ends[seen]
    return Group(*map(torch.from_numpy, (starts // BLOCK, keys, last)))


_ROW: ContextVar[tuple[Blocks, list[torch.Tensor]]] = ContextVar("row")
"""That is read, and its masks."""


def reads_blocks(model: PreTrainedModel) -> bool:
    """Whether `block_attention` is for this model: one on a CPU whose attention is PyTorch's."""
    config = model.config.get_text_config()
    return model.device.type == "cpu" and bool(config._attn_implementation == _FUSED)


@contextmanager
def block_attention(model: PreTrainedModel, row: Blocks) -> Iterator[torch.Tensor]:
    """Have a model read a row by its blocks. Gives the mask that it takes, which says nothing."""
    reading = _ROW.set((row, row.masks(model.dtype)))
    config = model.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, _BLOCKS
    try:
        yield torch.zeros(1, 1, 1, 1, dtype=model.dtype)
    finally:
        config._attn_implementation = before
        _ROW.reset(reading)


def seen_by_all(ends: torch.Tensor) -> torch.Tensor:
    """Whether a token sees each of its row, [..., tokens, tokens].

    Args:
        ends: the last place that sees each token, [..., tokens].
    """
    place = torch.arange(ends.shape[-1], device=ends.device)
    reader = place.unsqueeze(1)
    return (place <= reader) & (reader <= ends.unsqueeze(-2))


def to_add(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To scores: nothing to that of what is seen, the least number to others."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


def _by_blocks(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What transformers' `sdpa` gives of a row: the heads' outputs [1, tokens, heads, width].

    Args:
        query: [1, heads, tokens, width].
        key: of one head for a group of `query`'s; `value` too [1, key heads, tokens, width].
        attention_mask: says nothing.
    """
    row, added = _ROW.get()
    _, heads, tokens, width = query.shape
    if dropout or any(more.get(each) is not None for each in _OTHERS):
        mask = to_add(seen_by_all(row.ends), query.dtype).view(1, 1, tokens, tokens)
        found: tuple[torch.Tensor, None] = ALL_ATTENTION_FUNCTIONS[_FUSED](
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **more
        )
        return found
    key_heads = key.shape[1]
    rows = pad(query[0].transpose(0, 1), (0, 0, 0, 0, 0, -tokens % BLOCK))
    rows = rows.view(-1, BLOCK, key_heads, heads // key_heads, width).permute(2, 0, 3, 1, 4)
    sizes = [len(group.blocks) for group in row.groups]
    groups = torch.split(rows.index_select(1, row.blocks), sizes, 1)
    scale = width**-0.5 if scaling is None else scaling
    attend = _attend
    whole = heads * BLOCK * sum(group.keys.numel() for group in row.groups)
    if torch.is_grad_enabled() and whole > MOST_SCORES:
        attend = partial(checkpoint, _attend, use_reentrant=False, preserve_rng_state=False)
    outputs = []
    for queries, group, masks in zip(groups, row.groups, added, strict=True):
        size = max(1, MOST_SCORES // (heads * BLOCK * group.keys.shape[1]))
        parts = torch.split(group.keys, size), torch.split(masks, size)
        for own, places, mask in zip(torch.split(queries, size, 1), *parts, strict=True):
            outputs.append(attend(own, key[0], value[0], places, mask, scale))
    output = torch.cat(outputs).index_select(0, row.order)
    return output.view(1, -1, heads, value.shape[3])[:, :tokens], None


def _attend(
    queries: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    places: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The outputs of some blocks, [blocks, `BLOCK`, key heads, queries of a key, width].

    Args:
        queries: [key heads, blocks, queries of a key, `BLOCK`, width].
        key: `value` too, [key heads, tokens, width].
        places: of the keys, [blocks, keys].
        mask: added to the scores, [blocks, 1, `BLOCK`, keys].
    """
    (key_heads, _, shared, *_), (count, keys) = queries.shape, places.shape
    seen_keys, seen_values = (
        each.index_select(1, places.view(-1)).view(key_heads, count, keys, -1)
        for each in (key, value)
    )
    scores = queries.flatten(2, 3) @ seen_keys.transpose(2, 3)
    scores = scores.view(key_heads, count, shared, BLOCK, keys)
    shares = torch.add(mask, scores, alpha=scale).softmax(4)
    output = shares.flatten(2, 3) @ seen_values
    return output.view(key_heads, count, shared, BLOCK, -1).permute(1, 3, 0, 2, 4)


AttentionInterface.register(_BLOCKS, _by_blocks)
