"""LoX: extrapolate the low-rank safety subspace of the aligned model (arXiv 2506.15606, section 4).

    W = W_aligned + alpha Proj_k(W_aligned - W_base)

Proj_k keeps the part of a matrix in its `rank` leading left singular directions. The paper makes an
aligned model sturdier before it is fine-tuned; here the updates of experts, if there are any, are
added to it, each by its `weight`. What is not a matrix, and embeddings, have no such directions:
nothing is extrapolated there.
"""

import torch
from mergekit.merge_methods.base import BasePolicy, InputContract, PerNonBase, TensorGroup
from mergekit.merge_methods.easy_define import merge_method

from mergekit_align.merge_methods.ranges import Count
from mergekit_align.merge_methods.roles import Origin, Role, needs_roles, parts
from mergekit_align.merge_methods.subspace import is_matrix, spectrum


@merge_method(
    name="lox",
    pretty_name="LoX",
    reference_url="https://arxiv.org/abs/2506.15606",
    contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
)
def _lox(
    group: TensorGroup,
    role: PerNonBase[Role],
    weight: PerNonBase[float] = 1.0,
    rank: Count = 6,
    alpha: float = 1.25,
    origin: Origin = "base",
) -> torch.Tensor:
    models = parts(group, role, weight)
    merged = models.aligned.clone()
    if is_matrix(group):
        merged += alpha * spectrum(models.alignment).leading(rank)
    for update, own in models.updates(origin):
        merged += own * update
    return merged


lox = needs_roles(_lox, {"aligned"})
