"""Fisher merging: an average weighted by each model's diagonal Fisher information (arXiv 2111.09832).

    W = sum_i w_i F_i W_i / sum_i w_i F_i

elementwise, with F_i = E (d log p(y | x) / dW)^2 (section 3). The expectation over y is taken on the
samples' own responses, the empirical Fisher information. Statistics of several sample types are added
up by `alignment_weight`, `task_weight` and `benign_weight`. Where no model has any information, and for
tensors without statistics of their own, the plain average is taken.
"""

import torch
from mergekit.merge_methods.base import InputContract, PerInput, TensorGroup
from mergekit.merge_methods.easy_define import merge_method

from mergekit_align.merge_methods.ranges import Positive
from mergekit_align.merge_methods.roles import arithmetic_dtype
from mergekit_align.merge_methods.statistics import needs_statistics, read_statistics
from mergekit_align.samples import SampleType
from mergekit_align.stretches import in_stretches


@merge_method(
    name="fisher",
    pretty_name="Fisher merging",
    reference_url="https://arxiv.org/abs/2111.09832",
    contract=InputContract(min_inputs=2),
)
def _fisher(
    group: TensorGroup,
    statistics: PerInput[str],
    weight: PerInput[Positive] = 1.0,
    alignment_weight: Positive = 1.0,
    task_weight: Positive = 1.0,
    benign_weight: Positive = 1.0,
) -> torch.Tensor:
    dtype = arithmetic_dtype(group)
    types: dict[SampleType, float] = {
        "alignment": alignment_weight,
        "task": task_weight,
        "benign": benign_weight,
    }
    tensors = [entry.tensor for entry in group.entries]
    found = [read_statistics(statistics[e.id], "fisher", group, types) for e in group.entries]
    informations = [each for each in found if each is not None]
    if len(informations) < len(tensors):
        return in_stretches(_mean, tensors, dtype)
    weights = [weight[entry.id] for entry in group.entries]

    def weighted(*both: torch.Tensor) -> torch.Tensor:
        own, fishers = both[: len(tensors)], both[len(tensors) :]
        mean = _mean(*own)
        total, pulled = torch.zeros_like(mean), torch.zeros_like(mean)
        for tensor, information, share in zip(own, fishers, weights, strict=True):
            total.add_(information, alpha=share)
            pulled.add_((tensor - mean).mul_(information), alpha=share)
        return mean + torch.where(total > 0, pulled / total, 0.0)

    return in_stretches(weighted, [*tensors, *informations], dtype)


def _mean(*tensors: torch.Tensor) -> torch.Tensor:
    mean = tensors[0].clone()
    for tensor in tensors[1:]:
        mean += tensor
    return mean.div_(len(tensors))


fisher = needs_statistics(_fisher, "fisher")
