"""Safe LoRA: project an update onto the alignment subspace where it deviates (arXiv 2405.16833).

    W = W_aligned + C dW  where cos(dW, C dW) < tau,  W_aligned + dW  elsewhere

with C = V V^T / ||V||_F of the alignment vector V = W_aligned - W_base (section 3.2) and dW the
expert's update since its `origin`, which in the paper is the aligned model. The paper's dW is a LoRA's;
here it is the full difference, and several experts' are added, each by its `weight`. Embeddings, norms
and biases, which the paper leaves alone, are averaged. Where the aligned model equals the base nothing
deviates.
"""

import torch
from mergekit.merge_methods.base import BasePolicy, InputContract, PerNonBase, TensorGroup
from mergekit.merge_methods.easy_define import merge_method

from mergekit_align.merge_methods.ranges import Cosine
from mergekit_align.merge_methods.roles import Origin, Role, needs_roles, parts
from mergekit_align.merge_methods.subspace import cosine, is_matrix, project


@merge_method(
    name="safe_lora",
    pretty_name="Safe LoRA",
    reference_url="https://arxiv.org/abs/2405.16833",
    contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=2),
)
def _safe_lora(
    group: TensorGroup,
    role: PerNonBase[Role],
    weight: PerNonBase[float] = 1.0,
    tau: Cosine = 0.35,
    origin: Origin = "aligned",
) -> torch.Tensor:
    models = parts(group, role, weight)
    if not is_matrix(group):
        return models.average()
    merged = models.aligned.clone()
    for update, own in models.updates(origin):
        projected = project(models.alignment, update)
        merged += own * (projected if cosine(update, projected) < tau else update)
    return merged


safe_lora = needs_roles(_safe_lora, {"aligned", "expert"})
