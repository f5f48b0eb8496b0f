"""LSSF: add back the low-rank part of the safety vector (arXiv 2602.00038, section 4).

    W = W_expert + alpha Proj_k(W_aligned - W_base)

Proj_k keeps the part of a matrix in its k leading left singular directions. The rank follows the
entropy of the singular values, p_i = s_i / sum s: k is the smallest number of directions that hold the
share `eta` of -sum p_i log p_i, so that a layer that encodes safety densely keeps more. The updates of
several experts since their `origin` are added, each by its `weight`. What is not a matrix, and
embeddings, have no such directions: the expert's are kept.
"""

import torch
from mergekit.merge_methods.base import BasePolicy, InputContract, PerNonBase, TensorGroup
from mergekit.merge_methods.easy_define import merge_method

from mergekit_align.merge_methods.ranges import Share
from mergekit_align.merge_methods.roles import Origin, Role, needs_roles, parts
from mergekit_align.merge_methods.subspace import is_matrix, spectrum


def entropy_rank(values: torch.Tensor, eta: float) -> int:
    """Leading singular values that hold the share `eta` of all values' entropy; 0 where all are 0."""
    if not values.sum():
        return 0
    shares = values / values.sum()
    held = torch.special.entr(shares).cumsum(0)
    if not held[-1]:  # one direction holds all
        return 1
    return int((held < eta * held[-1]).sum()) + 1


@merge_method(
    name="lssf",
    pretty_name="LSSF",
    reference_url="https://arxiv.org/abs/2602.00038",
    contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=2),
)
def _lssf(
    group: TensorGroup,
    role: PerNonBase[Role],
    weight: PerNonBase[float] = 1.0,
    alpha: float = 1.0,
    eta: Share = 0.5,
    origin: Origin = "aligned",
) -> torch.Tensor:
    models = parts(group, role, weight)
    merged = (models.aligned if origin == "aligned" else models.base).clone()
    for update, own in models.updates(origin):
        merged += own * update
    if is_matrix(group):
        safety = spectrum(models.alignment)
        merged += alpha * safety.leading(entropy_rank(safety.values, eta))
    return merged


lssf = needs_roles(_lssf, {"aligned", "expert"})
