"""LED-Merging: locate important parameters, elect them, keep the models' disjoint (arXiv 2502.16770).

    W = W_base + sum_i w_i m_i * (W_i - W_base)

Located: the share `ratio` of a tensor's entries with the highest importance |theta * grad| on model i's
samples, in model i and in the base. Elected: those that are located in both. Disjoint: what is elected
for one model alone is its mask m_i; an entry that two models elect is left at the base (section 3). A
tensor without statistics of its own stays the base's. The paper tunes `ratio`; the default is ours.
"""

import numpy as np
import torch
from mergekit.merge_methods.base import BasePolicy, InputContract, PerNonBase, TensorGroup
from mergekit.merge_methods.easy_define import merge_method

from mergekit_align.merge_methods.ranges import Share
from mergekit_align.merge_methods.roles import arithmetic_dtype
from mergekit_align.merge_methods.statistics import needs_statistics, read_statistics
from mergekit_align.stretches import in_stretches, stretches

_SAMPLE = 2**16
"""Entries by which a tensor's distribution is told."""


def located(importance: torch.Tensor, ratio: float) -> torch.Tensor:
    """Where the highest entries are, a share `ratio` of them; boolean, of the same shape."""
    count = round(ratio * importance.numel())
    if count == 0:
        return torch.zeros_like(importance, dtype=torch.bool)
    least = _least_of_highest(importance.flatten(), count)
    chosen = importance >= least
    excess = int(chosen.count_nonzero()) - count
    if excess:
        equal = (importance == least).flatten().nonzero()[:, 0]
        chosen.view(-1)[equal[-excess:]] = False
    return chosen


def _least_of_highest(values: torch.Tensor, count: int) -> torch.Tensor:
    """The least of the `count` highest.

    On a CPU a sample of a large tensor tells between which values it lies; only what is there has to be
    selected from.
    """
    size = values.numel()
    if values.device.type != "cpu":
        return values.topk(count, sorted=False).values.min()
    near, left = values.numpy(), count
    if size > _SAMPLE:
        drawn = torch.randint(size, (_SAMPLE,), generator=torch.Generator().manual_seed(0))
        ranked = values[drawn].sort(descending=True).values
        place, margin = _SAMPLE * count / size, 3 * _SAMPLE**0.5
        high = float(ranked[max(0, int(place - margin))])
        low = float(ranked[min(_SAMPLE - 1, int(place + margin))])
        higher, between = 0, []
        for piece in stretches(values):
            own = values[piece].numpy()
            higher += int(np.count_nonzero(own > high))
            between.append(own[(own >= low) & (own <= high)])
        if higher < count <= higher + sum(map(len, between)):  # else the sample was no fair one
            near, left = np.concatenate(between), count - higher
    return torch.tensor(np.partition(near, len(near) - left)[len(near) - left])


@merge_method(
    name="led",
    pretty_name="LED-Merging",
    reference_url="https://arxiv.org/abs/2502.16770",
    contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=2),
)
def _led(
    group: TensorGroup,
    statistics: PerNonBase[str],
    base_statistics: PerNonBase[str],
    weight: PerNonBase[float] = 1.0,
    ratio: PerNonBase[Share] = 0.5,
) -> torch.Tensor:
    assert group.base is not None
    dtype = arithmetic_dtype(group)
    elected: list[torch.Tensor] = []
    for entry in group.non_base:
        places = (statistics[entry.id], base_statistics[entry.id])
        importances = [read_statistics(place, "importance", group) for place in places]
        masks = [located(each, ratio[entry.id]) for each in importances if each is not None]
        if len(masks) < len(places):
            base: torch.Tensor = group.base.tensor.to(dtype)
            return base
        elected.append(masks[0] & masks[1])
    models = group.non_base

    def merged(base: torch.Tensor, *both: torch.Tensor) -> torch.Tensor:
        own, masks = both[: len(models)], both[len(models) :]
        seen, shared = torch.zeros_like(masks[0]), torch.zeros_like(masks[0])
        for mask in masks:
            shared |= seen & mask
            seen |= mask
        result = base.clone()
        for entry, tensor, mask in zip(models, own, masks, strict=True):
            result += weight[entry.id] * torch.where(mask & ~shared, tensor - base, 0.0)
        return result

    tensors = [group.base.tensor, *(entry.tensor for entry in models), *elected]
    return in_stretches(merged, tensors, dtype)


led = needs_statistics(_led, "importance")
