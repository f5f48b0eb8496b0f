"""Safe LoRA: project an update onto the alignment subspace where it deviates (arXiv 2405.16833).

    W = W_aligned + C dW  where cos(dW, C dW) < tau,  W_aligned + dW  elsewhere

with C = V V^T / ||V||_F of the alignment vector V = W_aligned - W_base (section 3.2) and dW the
expert's update since its `origin`, which in the paper is the aligned model. The paper's dW is a LoRA's;
here it is the full difference, and several experts' are added, each by its `weight`. Embeddings, norms
and biases, which the paper leaves alone, are averaged. Where the aligned model equals the base nothing
deviates. With `lowest` k the update deviates in the k matrices whose cosines are lowest, whatever `tau`
is; these are found by reading the models' matrices once before the merge.
"""

from collections.abc import Hashable
from functools import lru_cache

import torch
from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from mergekit.merge_methods.base import BasePolicy, InputContract, PerNonBase, TensorGroup
from mergekit.merge_methods.easy_define import merge_method

from mergekit_align.merge_methods.ranges import Cosine, Count
from mergekit_align.merge_methods.roles import MergeConfigError, Origin, Role, needs_roles, parts
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
    lowest: Count | None = None,
    origin: Origin = "aligned",
) -> torch.Tensor:
    models = parts(group, role, weight)
    if not is_matrix(group):
        return models.average()
    assert group.base is not None
    (aligned,) = (entry.id for entry in group.non_base if role[entry.id] == "aligned")
    experts = [entry.id for entry in group.non_base if role[entry.id] == "expert"]
    merged = models.aligned.clone()
    for (update, own), expert in zip(models.updates(origin), experts, strict=True):
        projected = project(models.alignment, update)
        if lowest is not None:
            origin_id = aligned if origin == "aligned" else group.base.id
            cosines = _cosines(group.base.id, aligned, expert, origin_id, group.tensors[0].device)
            deviates = group.metadata.name in cosines[:lowest]
        else:
            deviates = cosine(update, projected) < tau
        merged += own * (projected if deviates else update)
    return merged


@lru_cache(16)
def _cosines(
    base: Hashable, aligned: Hashable, expert: Hashable, origin: Hashable, device: torch.device
) -> list[str]:
    """Names of all matrices, those whose updates deviate most first."""
    loaders = {model: _loader(model) for model in {base, aligned, expert, origin}}
    assert isinstance(base, ModelReference)
    vocabulary = base.config().get_text_config().vocab_size

    def read(model: Hashable, name: str) -> torch.Tensor:
        tensor: torch.Tensor = loaders[model].get_tensor(name, device="cpu")
        return tensor.to(device, torch.float32)

    found: dict[str, float] = {}
    for name in loaders[base].index.tensor_paths:
        start = read(base, name)
        if start.ndim == 2 and start.shape[0] != vocabulary:
            update = read(expert, name) - read(origin, name)
            found[name] = cosine(update, project(read(aligned, name) - start, update))
    return sorted(found, key=found.__getitem__)


def _loader(model: Hashable) -> LazyTensorLoader:
    if not isinstance(model, ModelReference) or model.lora is not None:
        raise MergeConfigError(
            f"lowest: found {model}, a LoRA or no file; expected models whose tensors can be read "
            "before the merge (give `tau`, or merge the LoRA first)"
        )
    return LazyTensorLoader(ShardedTensorIndex.from_disk(str(model.local_path())))


safe_lora = needs_roles(_safe_lora, {"aligned", "expert"})
