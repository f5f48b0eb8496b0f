"""RegMean++: RegMean on the inputs that the merged model's own layers give (arXiv 2508.03121).

The formula is RegMean's. A layer's Gram matrices are of what model i's layer reads when all layers
before it are the merged ones (section 3): `mergekit-align-stats --merge CONFIG` computes them, layer
after layer, for the weights that the config has.
"""

import torch
from mergekit.merge_methods.base import InputContract, PerInput, TensorGroup
from mergekit.merge_methods.easy_define import merge_method

from mergekit_align.merge_methods.ranges import Fraction, Positive
from mergekit_align.merge_methods.regmean import OFF_DIAGONAL, merge_group
from mergekit_align.merge_methods.statistics import needs_statistics


@merge_method(
    name="regmean_plus",
    pretty_name="RegMean++",
    reference_url="https://arxiv.org/abs/2508.03121",
    contract=InputContract(min_inputs=2),
)
def _regmean_plus(
    group: TensorGroup,
    statistics: PerInput[str],
    weight: PerInput[Positive] = 1.0,
    alignment_weight: Positive = 1.0,
    off_diagonal: Fraction = OFF_DIAGONAL,
) -> torch.Tensor:
    return merge_group(group, "propagated_gram", statistics, weight, alignment_weight, off_diagonal)


regmean_plus = needs_statistics(_regmean_plus, "propagated_gram")
