"""SafeMERGE: mix in the safe model where an update leaves the alignment subspace (arXiv 2503.17239).

    W = W_aligned + alpha dW + (1 - alpha) dW_safe  where cos(dW, C dW) < tau
    W = W_aligned + dW                              elsewhere

with C as in Safe LoRA, dW the expert's update since its `origin` and dW_safe that of the model of role
`safe`, the aligned model fine-tuned on safety data (section 3). Several experts' updates are added,
each by its `weight`. Embeddings, norms and biases, which the paper leaves alone, are averaged. Where
the aligned model equals the base nothing deviates.
"""

import torch
from mergekit.merge_methods.base import BasePolicy, InputContract, PerNonBase, TensorGroup
from mergekit.merge_methods.easy_define import merge_method

from mergekit_align.merge_methods.ranges import Cosine, Share
from mergekit_align.merge_methods.roles import Origin, Role, needs_roles, parts
from mergekit_align.merge_methods.subspace import cosine, is_matrix, project


@merge_method(
    name="safemerge",
    pretty_name="SafeMERGE",
    reference_url="https://arxiv.org/abs/2503.17239",
    contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=3),
)
def _safemerge(
    group: TensorGroup,
    role: PerNonBase[Role],
    weight: PerNonBase[float] = 1.0,
    tau: Cosine = 0.7,
    alpha: Share = 0.5,
    origin: Origin = "aligned",
) -> torch.Tensor:
    models = parts(group, role, weight)
    if not is_matrix(group):
        return models.average()
    assert models.safe is not None
    merged, safe = models.aligned.clone(), models.safe - models.aligned
    for update, own in models.updates(origin):
        deviates = cosine(update, project(models.alignment, update)) < tau
        merged += own * (alpha * update + (1 - alpha) * safe if deviates else update)
    return merged


safemerge = needs_roles(_safemerge, {"aligned", "expert", "safe"})
