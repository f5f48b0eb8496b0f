"""RegMean: the weights whose outputs are nearest to each model's on its own inputs (arXiv 2212.09849).

    W = (sum_i w_i W_i G_i) (sum_i w_i G_i)^-1

with the Gram matrix G_i = X_i X_i^T of the inputs that a layer of model i reads, a token (section 3.1;
weights W are [out, in]). The entries of G off its diagonal are scaled by `off_diagonal` (section 3.2),
0.9 in the paper. Statistics of several sample types are added up, those of type `alignment` times
`alignment_weight`: safety data is a task of its own. Where no model has an input, and for embeddings,
norms, biases and the output layer, the plain average is taken, as the paper does for what is no linear
layer.
"""

from collections.abc import Sequence

import torch
from mergekit.merge_methods.base import InputContract, PerInput, PerInputValues, TensorGroup
from mergekit.merge_methods.easy_define import merge_method

from mergekit_align.merge_methods.ranges import Fraction, Positive
from mergekit_align.merge_methods.roles import arithmetic_dtype
from mergekit_align.merge_methods.statistics import needs_statistics, read_statistics
from mergekit_align.statistics.files import Kind

_RIDGE = 1e-6
"""Of the mean diagonal: keeps directions that no input has at the plain average."""

OFF_DIAGONAL = 0.9


def regression_mean(
    weights: Sequence[torch.Tensor], grams: Sequence[torch.Tensor], off_diagonal: float
) -> torch.Tensor:
    """The merged weight [out, in].

    Args:
        weights: the models' [out, in].
        grams: of their inputs, each times its model's weight [in, in].
    """
    mean = torch.stack(list(weights)).mean(0)
    total, pulled = torch.zeros_like(grams[0]), torch.zeros_like(mean)
    for weight, gram in zip(weights, grams, strict=True):
        shrunk = off_diagonal * gram
        shrunk.diagonal().add_((1 - off_diagonal) * gram.diagonal())
        total += shrunk
        pulled += (weight - mean) @ shrunk
    ridge = _RIDGE * total.diagonal().mean()
    if not ridge:
        return mean
    total.diagonal().add_(ridge)
    # total is symmetric, so that a solution from the left is one from the right.
    merged: torch.Tensor = mean + torch.linalg.solve(total, pulled.T).T
    return merged


def merge_group(
    group: TensorGroup,
    kind: Kind,
    statistics: PerInputValues[str],
    weight: PerInputValues[float],
    alignment_weight: float,
    off_diagonal: float,
) -> torch.Tensor:
    """`regression_mean` of a group, or the plain average where it has no statistics."""
    dtype = arithmetic_dtype(group)
    tensors = [entry.tensor.to(dtype) for entry in group.entries]
    grams = [
        read_statistics(statistics[entry.id], kind, group, {"alignment": alignment_weight})
        for entry in group.entries
    ]
    known = [gram for gram in grams if gram is not None]
    if len(known) < len(tensors):
        return torch.stack(tensors).mean(0)
    scaled = [weight[entry.id] * gram for entry, gram in zip(group.entries, known, strict=True)]
    return regression_mean(tensors, scaled, off_diagonal)


@merge_method(
    name="regmean",
    pretty_name="RegMean",
    reference_url="https://arxiv.org/abs/2212.09849",
    contract=InputContract(min_inputs=2),
)
def _regmean(
    group: TensorGroup,
    statistics: PerInput[str],
    weight: PerInput[Positive] = 1.0,
    alignment_weight: Positive = 1.0,
    off_diagonal: Fraction = OFF_DIAGONAL,
) -> torch.Tensor:
    return merge_group(group, "gram", statistics, weight, alignment_weight, off_diagonal)


regmean = needs_statistics(_regmean, "gram")
