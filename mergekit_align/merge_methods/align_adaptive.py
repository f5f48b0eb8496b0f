"""Each model's update as it acts on that model's own inputs, and as little as possible on the others'.

    W = W_base + sum_i w_i U_i,   U_i = T_i (G_i + e) (G_i + mu sum_{j != i} G_j + e)^-1

with the task vectors T_i = W_i - W_base and Gram matrices G_i of the inputs that a layer of model i
reads on its samples, a token. U_i is what minimises

    |(U - T_i) X_i|^2 + mu |U X_others|^2 + e |U - T_i|^2

so that the expert's update is silenced in directions which only safety data has, the aligned model's in
those which only tasks have, and both stay whole where no data is. `mu` (`interference`) 0 is task
arithmetic (arXiv 2212.04089); RegMean (arXiv 2212.09849) poses one regression for all models, which
averages them in directions that they share, the chat template's for instance, and so halves both.
`alignment_weight` scales the Gram matrices of samples of type `alignment`. Embeddings, norms, biases
and the output layer, which have no Gram matrix, are added as in task arithmetic. Ours; the
documentation says what it was measured against.
"""

import torch
from mergekit.merge_methods.base import BasePolicy, InputContract, PerNonBase, TensorGroup
from mergekit.merge_methods.easy_define import merge_method

from mergekit_align.merge_methods.ranges import Positive
from mergekit_align.merge_methods.roles import arithmetic_dtype
from mergekit_align.merge_methods.statistics import needs_statistics, read_statistics

_RIDGE = 1e-3
"""Of the mean diagonal of all models' Gram matrices: keeps updates whole where no model has inputs."""


@merge_method(
    name="align_adaptive",
    pretty_name="Alignment-adaptive task arithmetic",
    contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=2),
)
def _align_adaptive(
    group: TensorGroup,
    statistics: PerNonBase[str],
    weight: PerNonBase[float] = 1.0,
    interference: Positive = 0.1,
    alignment_weight: Positive = 1.0,
) -> torch.Tensor:
    assert group.base is not None
    dtype = arithmetic_dtype(group)
    merged: torch.Tensor = group.base.tensor.to(dtype)
    updates = {entry.id: entry.tensor.to(dtype) - merged for entry in group.non_base}
    grams = {
        entry.id: read_statistics(
            statistics[entry.id], "gram", group, {"alignment": alignment_weight}
        )
        for entry in group.non_base
    }
    known = {name: gram for name, gram in grams.items() if gram is not None}
    total = sum(known.values())
    if isinstance(total, torch.Tensor) and len(known) == len(updates) and bool(total.any()):
        ridge = torch.zeros_like(total)
        ridge.diagonal().fill_(_RIDGE * float(total.diagonal().mean()))
        for name, own in known.items():
            system = own + interference * (total - own) + ridge
            # Both factors are symmetric: solved from the left, and turned.
            updates[name] = updates[name] @ torch.linalg.solve(system, own + ridge).T
    for name, update in updates.items():
        merged = merged + weight[name] * update
    return merged


align_adaptive = needs_statistics(_align_adaptive, "gram")
