"""Faster ways to the bits of mergekit's kernels, for merges that a search repeats.

They are mergekit's own operations in mergekit's order, on stretches of a tensor that stay in the
processor's cache, so that memory is read and written once. What depends on the inputs alone is made
once: for TIES the order of a task vector by magnitude, which is nearly all that it costs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

from mergekit_align.evolve.magnitudes import Magnitudes, Selection

STRETCH = 2**15
"""Numbers of a tensor that are merged at a time, for each thread; torch shares out longer ones."""


class Kernel(ABC):
    """Merges one tensor, whose inputs it knows, again and again."""

    dtype: torch.dtype
    """Floating type of the merging."""

    @abstractmethod
    def merge(
        self,
        target: torch.Tensor,
        shared: Mapping[str, Any],
        own: Mapping[ModelReference, Mapping[str, Any]],
    ) -> None:
        """Write the merged tensor into `target`, of the same shape and any floating type.

        Args:
            shared: the method's parameters that all inputs share.
            own: those of each input.
        """


def kernel_for(
    task: ExecuteMergeMethodTask, inputs: Mapping[ModelReference, torch.Tensor]
) -> Kernel | None:
    """The kernel of a merge; `None` where there is none but mergekit's own."""
    tensors = [inputs[model] for model in task.model_order if model in inputs]
    first = tensors[0]
    alike = all(
        each.shape == first.shape
        and each.dtype == torch.bfloat16
        and each.is_contiguous()
        and each.device.type == "cpu"
        for each in tensors
    )
    if not alike or len(tensors) < len(task.model_order) or first.numel() == 0:
        return None
    if task.method_name == "linear":
        return LinearKernel(task.model_order, tensors)
    if task.method_name in ("task_arithmetic", "ties") and task.base_model in inputs:
        others = [model for model in task.model_order if model != task.base_model]
        if others:
            kind = TaskArithmeticKernel if task.method_name == "task_arithmetic" else TiesKernel
            return kind(others, [inputs[m] for m in others], inputs[task.base_model])
    return None


class LinearKernel(Kernel):
    """`linear`: W = sum of w_m W_m, divided by the sum of the weights where they are normalised."""

    dtype = torch.bfloat16

    def __init__(self, models: Sequence[ModelReference], tensors: Sequence[torch.Tensor]) -> None:
        self._models = models
        self._tensors = [each.reshape(-1) for each in tensors]

    def merge(
        self,
        target: torch.Tensor,
        shared: Mapping[str, Any],
        own: Mapping[ModelReference, Mapping[str, Any]],
    ) -> None:
        weight = torch.tensor([own[model]["weight"] for model in self._models])
        denominator = weight.sum().reshape(1) if shared["normalize"] else None
        for piece, out in _stretches(target):
            result = torch.zeros(out.shape)
            for tensor, coefficient in zip(self._tensors, weight.split(1), strict=True):
                result.addcmul_(tensor[piece], coefficient)
            if denominator is not None:
                result.div_(denominator)
            out.copy_(result.to(torch.bfloat16))


class TaskArithmeticKernel(Kernel):
    """`task_arithmetic`: W = base + lambda * sum of w_m (W_m - base)."""

    dtype = torch.bfloat16

    def __init__(
        self,
        models: Sequence[ModelReference],
        tensors: Sequence[torch.Tensor],
        base: torch.Tensor,
    ) -> None:
        self._models = models
        self._tensors = [each.reshape(-1) for each in tensors]
        self._base = base.reshape(-1)

    def merge(
        self,
        target: torch.Tensor,
        shared: Mapping[str, Any],
        own: Mapping[ModelReference, Mapping[str, Any]],
    ) -> None:
        weights = torch.tensor(
            [own[model]["weight"] for model in self._models], dtype=torch.bfloat16
        ).unsqueeze(1)
        for piece, out in _stretches(target):
            base = self._base[piece]
            deltas = self._task_vectors(piece, base)
            deltas.mul_(weights)
            mixed, divisor = self._mix(deltas, weights)
            if shared["normalize"]:
                mixed /= divisor
            if shared["lambda"] != 1:
                mixed *= shared["lambda"]
            out.copy_(base + mixed)

    def _task_vectors(self, piece: slice, base: torch.Tensor) -> torch.Tensor:
        deltas = base.new_empty((len(self._tensors), *base.shape))
        for row, tensor in zip(deltas, self._tensors, strict=True):
            torch.sub(tensor[piece], base, out=row)
        return deltas

    def _mix(
        self, deltas: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        divisor = weights.sum(dim=0)
        divisor[divisor.abs() < 1e-8] = 1
        return deltas.sum(dim=0), divisor


class TiesKernel(TaskArithmeticKernel):
    """`ties`: the largest numbers of each task vector, of those the ones of the prevailing sign."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._magnitudes: list[Magnitudes | None] = [None] * len(self._tensors)
        self._selections: list[Selection | None] = []

    def merge(
        self,
        target: torch.Tensor,
        shared: Mapping[str, Any],
        own: Mapping[ModelReference, Mapping[str, Any]],
    ) -> None:
        if shared["rescale"]:
            raise NotImplementedError("a genome does not rescale")
        self._selections = [
            self._select(index, own[model]["density"]) for index, model in enumerate(self._models)
        ]
        super().merge(target, shared, own)

    def _select(self, index: int, density: float) -> Selection | None:
        if density >= 1:
            return None
        magnitudes = self._magnitudes[index]
        if magnitudes is None:
            magnitudes = Magnitudes(self._tensors[index] - self._base)
            self._magnitudes[index] = magnitudes
        return magnitudes.largest(density)

    def _task_vectors(self, piece: slice, base: torch.Tensor) -> torch.Tensor:
        deltas = super()._task_vectors(piece, base)
        for delta, selection in zip(deltas, self._selections, strict=True):
            if selection is not None:
                delta.mul_(selection.mask(delta, piece))
        return deltas

    def _mix(
        self, deltas: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        majority = (deltas.sum(dim=0) >= 0).to(torch.int8) * 2 - 1
        agrees = deltas.sign().to(torch.int8) == majority
        divisor = (weights * agrees).sum(dim=0)
        divisor[divisor == 0] = 1
        return (deltas * agrees).sum(dim=0), divisor


def _stretches(target: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    flat = target.view(-1)
    length = STRETCH * torch.get_num_threads()
    for start in range(0, flat.numel(), length):
        piece = slice(start, min(start + length, flat.numel()))
        yield piece, flat[piece]
