"""LED-Merging: locate important parameters, elect them, keep the models' disjoint (arXiv 2502.16770).

    W = W_base + sum_i w_i m_i * (W_i - W_base)

Located: the share `ratio` of a tensor's entries with the highest importance |theta * grad| on model i's
samples, in model i and in the base. Elected: those that are located in both. Disjoint: what is elected
for one model alone is its mask m_i; an entry that two models elect is left at the base (section 3). A
tensor without statistics of its own stays the base's. The paper tunes `ratio`; the default is ours.
"""

import torch
from mergekit.merge_methods.base import BasePolicy, InputContract, PerNonBase, TensorGroup
from mergekit.merge_methods.easy_define import merge_method

from mergekit_align.merge_methods.ranges import Share
from mergekit_align.merge_methods.roles import arithmetic_dtype
from mergekit_align.merge_methods.statistics import needs_statistics, read_statistics


def located(importance: torch.Tensor, ratio: float) -> torch.Tensor:
    """Where the highest entries are, a share `ratio` of them; boolean, of the same shape."""
    chosen = torch.zeros(importance.numel(), dtype=torch.bool, device=importance.device)
    count = round(ratio * importance.numel())
    chosen[importance.flatten().topk(count, sorted=False).indices] = True
    return chosen.view_as(importance)


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
    base: torch.Tensor = group.base.tensor.to(dtype)
    elected: list[torch.Tensor] = []
    for entry in group.non_base:
        places = (statistics[entry.id], base_statistics[entry.id])
        importances = [read_statistics(place, "importance", group) for place in places]
        both = torch.ones_like(base, dtype=torch.bool)
        for importance in importances:
            if importance is None:
                return base
            both &= located(importance, ratio[entry.id])
        elected.append(both)
    counts = torch.stack(elected).sum(0)
    merged = base.clone()
    for entry, mask in zip(group.non_base, elected, strict=True):
        update = entry.tensor.to(dtype) - base
        merged += weight[entry.id] * torch.where(mask & (counts == 1), update, 0.0)
    return merged


led = needs_statistics(_led, "importance")
