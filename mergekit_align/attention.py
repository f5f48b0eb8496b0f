"""Attention of short texts on a CPU, as two products and a softmax.

PyTorch's fused kernel never holds the scores of attention, which matters on a GPU and for long texts.
On a CPU it takes twice as long as plain products, and up to seven times as long in its backward pass,
as long as the scores fit the caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_SCORES = 2**24
"""Scores that are held at once, 32 MiB in bfloat16; where there are more, PyTorch's kernel is used."""
WIDTH = 32
"""Numbers in bfloat16 that a register holds: a softmax over scores of other widths is far slower."""
_OTHERS = "position_bias", "softcap", "s_aux"  # what else some models have done to the scores
_FUSED, _PRODUCTS = "sdpa", "mergekit_align_products"


@contextmanager
def short_attention(model: PreTrainedModel) -> Iterator[None]:
    """Have a model on a CPU read texts, with a mask of its own for every token, by plain products.

    Nothing changes for a model whose attention is not PyTorch's.
    """
    config = model.config.get_text_config()
    if model.device.type != "cpu" or config._attn_implementation != _FUSED:
        yield
        return
    config._attn_implementation = _PRODUCTS
    try:
        yield
    finally:
        config._attn_implementation = _FUSED


def _by_products(
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
    """What transformers' `sdpa` gives: the heads' outputs [batch, tokens, heads, width].

    Args:
        query: [batch, heads, tokens, width].
        key: of one head for a group of `query`'s; `value` too [batch, key heads, all tokens, width].
        attention_mask: added to the scores [batch, 1, tokens, all tokens].
    """
    special = dropout or any(more.get(each) is not None for each in _OTHERS)
    if special or query[..., 0].numel() * key.shape[2] > MOST_SCORES:
        found: tuple[torch.Tensor, None] = ALL_ATTENTION_FUNCTIONS[_FUSED](
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
        return found
    batch, heads, tokens, width = query.shape
    lacking = -key.shape[2] % WIDTH
    if lacking:
        key, value = (pad(each, (0, 0, 0, lacking)) for each in (key, value))
        attention_mask = pad(attention_mask, (0, lacking), value=torch.finfo(query.dtype).min)
    # The queries of a key's group are rows of one product.
    grouped = query.reshape(batch, key.shape[1], -1, width)
    scores = (grouped @ key.transpose(2, 3)).view(batch, heads, tokens, -1)
    scale = width**-0.5 if scaling is None else scaling
    shares = torch.add(attention_mask, scores, alpha=scale).softmax(3)
    output = (shares.view(*grouped.shape[:3], -1) @ value).view(batch, heads, tokens, -1)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(_PRODUCTS, _by_products)
