"""RESTA: add back the safety that fine-tuning has cost (arXiv 2402.11746, section 3).

    W = W_expert + gamma (W_aligned - W_base)

The safety vector, aligned minus unaligned (`base_model`), is added to every parameter of the expert,
scaled by `gamma`. With `density` below 1 the expert's update since its `origin` is thinned by DARE
(arXiv 2311.03099) first: entries are dropped at random and the rest divided by the density. The
updates of several experts are added, each by its `weight`.
"""

import torch
from mergekit.merge_methods.base import BasePolicy, InputContract, PerNonBase, TensorGroup
from mergekit.merge_methods.easy_define import merge_method

from mergekit_align.merge_methods.ranges import Share
from mergekit_align.merge_methods.roles import (
    Origin,
    Parts,
    Role,
    arithmetic_dtype,
    needs_roles,
    stored_parts,
)
from mergekit_align.stretches import in_stretches


@merge_method(
    name="resta",
    pretty_name="RESTA",
    reference_url="https://arxiv.org/abs/2402.11746",
    contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=2),
)
def _resta(
    group: TensorGroup,
    role: PerNonBase[Role],
    weight: PerNonBase[float] = 1.0,
    gamma: float = 1.0,
    density: Share = 1.0,
    origin: Origin = "aligned",
) -> torch.Tensor:
    models = stored_parts(group, role, weight)
    weights = [own for _, own in models.experts]

    def restored(base: torch.Tensor, aligned: torch.Tensor, *experts: torch.Tensor) -> torch.Tensor:
        own = Parts(base, aligned, list(zip(experts, weights, strict=True)), None)
        merged = (aligned if origin == "aligned" else base) + gamma * own.alignment
        for update, share in own.updates(origin):
            if density < 1:
                update = update * torch.bernoulli(torch.full_like(update, density)) / density
            merged += share * update
        return merged

    tensors = [models.base, models.aligned, *(tensor for tensor, _ in models.experts)]
    return in_stretches(restored, tensors, arithmetic_dtype(group))


resta = needs_roles(_resta, {"aligned", "expert"})
