"""Faster ways to the bits of mergekit's kernels, for merges that a search repeats.

They are mergekit's own operations in mergekit's order, on stretches of a tensor that stay in the
processor's cache, so that memory is read and written once; `compiled` has them for large models on a
CPU. What depends on the inputs alone is made once: for TIES the order of a task vector by magnitude,
which is nearly all that it costs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

from mergekit_align.evolve.magnitudes import MAGNITUDE, Magnitudes, Selection, keep
from mergekit_align.stretches import ENTRIES, stretches

_ONE = 0x3F80  # the bits of 1 in bfloat16


class Kernel(ABC):
    """Merges one tensor, whose inputs it knows, again and again."""

    def prepare(self, own: Mapping[ModelReference, Mapping[str, Any]]) -> bool:
        """Make what depends on the inputs alone, which takes more memory than merging does.

        Args:
            own: the method's parameters of each input.

        Returns:
            Whether there was anything to make.
        """
        return False

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

    @abstractmethod
    def products(
        self,
        gradient: torch.Tensor,
        shared: Mapping[str, Any],
        own: Mapping[ModelReference, Mapping[str, Any]],
    ) -> dict[ModelReference, float]:
        """The derivative by each model's weight, given that by the merged tensor, of its shape."""


class LinearKernel(Kernel):
    """`linear`: W = sum of w_m W_m, divided by the sum of the weights where they are normalised."""

    def __init__(self, models: Sequence[ModelReference], tensors: Sequence[torch.Tensor]) -> None:
        self._models = models
        self._tensors = [each.reshape(-1) for each in tensors]

    def merge(
        self,
        target: torch.Tensor,
        shared: Mapping[str, Any],
        own: Mapping[ModelReference, Mapping[str, Any]],
    ) -> None:
        weight = self._weights(own, target.device)
        denominator = weight.sum().reshape(1) if shared["normalize"] else None
        for _, (out, *parts) in _stretches(target, *self._tensors):
            result = torch.zeros(out.shape, device=out.device)
            for part, coefficient in zip(parts, weight.unsqueeze(1), strict=True):
                result.addcmul_(part, coefficient)
            if denominator is not None:
                result.div_(denominator)
            out.copy_(result.to(torch.bfloat16))

    def products(
        self,
        gradient: torch.Tensor,
        shared: Mapping[str, Any],
        own: Mapping[ModelReference, Mapping[str, Any]],
    ) -> dict[ModelReference, float]:
        found = [0.0] * len(self._models)
        for _, (slope, *parts) in _stretches(gradient, *self._tensors):
            slope = slope.float()
            for index, part in enumerate(parts):
                found[index] += float(slope @ part.float())
        if shared["normalize"]:  # dW/dw_m = (W_m - W) / sum of the weights
            weights = [own[model]["weight"] for model in self._models]
            total = sum(weights)
            merged = sum(w * each for w, each in zip(weights, found, strict=True)) / total
            found = [(each - merged) / total for each in found]
        return dict(zip(self._models, found, strict=True))

    def _weights(
        self, own: Mapping[ModelReference, Mapping[str, Any]], device: torch.device
    ) -> torch.Tensor:
        """[models]"""
        numbers = tuple(own[model]["weight"] for model in self._models)
        return _tensor(numbers, torch.float32, device)


class TaskArithmeticKernel(Kernel):
    """`task_arithmetic`: W = base + lambda * sum of w_m (W_m - base)."""

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
        kept = self._select(own)
        weights = self._weights(own, target.device)
        for piece, (out, base) in _stretches(target, self._base):
            deltas = self._task_vectors(piece, base, kept) * weights
            agree = self._agreement(deltas)
            mixed = _sum(deltas if agree is None else keep(deltas, agree))
            if shared["normalize"]:
                mixed /= self._divisor(weights, agree)
            if shared["lambda"] != 1:
                mixed *= shared["lambda"]
            torch.add(mixed, base, out=out)

    def products(
        self,
        gradient: torch.Tensor,
        shared: Mapping[str, Any],
        own: Mapping[ModelReference, Mapping[str, Any]],
    ) -> dict[ModelReference, float]:
        kept = self._select(own)
        weights = self._weights(own, gradient.device)
        found = torch.zeros(len(self._models), dtype=torch.float64)
        for piece, (slope, base) in _stretches(gradient, self._base):
            deltas = self._task_vectors(piece, base, kept)
            agree = self._agreement(deltas * weights)
            by_weight = (deltas if agree is None else keep(deltas, agree)).float()
            if shared["normalize"]:
                divisor = self._divisor(weights, agree).float()
                mixed = (by_weight * weights.float()).sum(0) / divisor
                by_weight = (by_weight - (mixed if agree is None else mixed * -agree)) / divisor
            found += (by_weight @ slope.float()).double().cpu()
        values = (found * shared["lambda"]).tolist()
        return dict(zip(self._models, values, strict=True))

    def _weights(
        self, own: Mapping[ModelReference, Mapping[str, Any]], device: torch.device
    ) -> torch.Tensor:
        """[models, 1]"""
        numbers = tuple(own[model]["weight"] for model in self._models)
        return _tensor(numbers, torch.bfloat16, device).unsqueeze(1)

    def _select(
        self, own: Mapping[ModelReference, Mapping[str, Any]]
    ) -> Sequence[Selection | None]:
        """What of each task vector is kept; `None` for all of it."""
        return [None] * len(self._models)

    def _task_vectors(
        self, piece: slice, base: torch.Tensor, kept: Sequence[Selection | None]
    ) -> torch.Tensor:
        """[models, numbers], which are not to be changed."""
        known = self._small
        deltas = self._differences(piece, base) if known is None else known
        if any(kept):
            deltas = deltas.clone() if deltas is known else deltas
            for row, selection in zip(deltas, kept, strict=True):
                if selection is not None:
                    row.copy_(keep(row, selection.mask(row, piece)))
        return deltas

    def _differences(self, piece: slice, base: torch.Tensor) -> torch.Tensor:
        """From the base, [models, numbers]."""
        deltas = base.new_empty((len(self._tensors), *base.shape))
        for row, tensor in zip(deltas, self._tensors, strict=True):
            torch.sub(tensor[piece], base, out=row)
        return deltas

    @cached_property
    def _small(self) -> torch.Tensor | None:
        """The differences, of a tensor so small that they may be kept: large models have few such."""
        small = self._base.device.type == "cpu" and self._base.numel() <= ENTRIES
        return self._differences(slice(None), self._base) if small else None

    def _agreement(self, deltas: torch.Tensor) -> torch.Tensor | None:
        """Which numbers of the weighted task vectors count, as `keep` takes them; `None` for all."""
        return None

    def _divisor(self, weights: torch.Tensor, agree: torch.Tensor | None) -> torch.Tensor:
        divisor = weights.sum(dim=0)
        divisor[divisor.abs() < 1e-8] = 1
        return divisor


class TiesKernel(TaskArithmeticKernel):
    """`ties`: the largest numbers of each task vector, of those the ones of the prevailing sign."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._magnitudes: list[Magnitudes | None] = [None] * len(self._tensors)

    def prepare(self, own: Mapping[ModelReference, Mapping[str, Any]]) -> bool:
        missing = [
            index
            for index, model in enumerate(self._models)
            if own[model]["density"] < 1 and self._magnitudes[index] is None
        ]
        for index in missing:
            self._magnitudes[index] = Magnitudes(self._tensors[index] - self._base)
        return bool(missing)

    def _select(
        self, own: Mapping[ModelReference, Mapping[str, Any]]
    ) -> Sequence[Selection | None]:
        self.prepare(own)
        densities = [own[model]["density"] for model in self._models]
        return [
            None if magnitudes is None or density >= 1 else magnitudes.largest(density)
            for magnitudes, density in zip(self._magnitudes, densities, strict=True)
        ]

    def _agreement(self, deltas: torch.Tensor) -> torch.Tensor | None:
        # A number whose sign bit is not the sum's disagrees, and so does a zero, which has no sign.
        # (A sum of -0 is one of zeros alone.)
        bits, prevailing = deltas.view(torch.int16), _sum(deltas).view(torch.int16)
        return (-(bits & MAGNITUDE) & ~(bits ^ prevailing)) >> 15

    def _divisor(self, weights: torch.Tensor, agree: torch.Tensor | None) -> torch.Tensor:
        assert agree is not None  # of this class it never is
        bits = _sum(keep(weights, agree)).view(torch.int16)
        zero = ((bits & MAGNITUDE) - 1) >> 15
        return ((bits & ~zero) | (zero & _ONE)).view(torch.bfloat16)


KERNELS: Mapping[str, type[Kernel]] = {
    "linear": LinearKernel,
    "task_arithmetic": TaskArithmeticKernel,
    "ties": TiesKernel,
}
"""Of each method that has one."""


def kernel_for(
    task: ExecuteMergeMethodTask,
    inputs: Mapping[ModelReference, torch.Tensor],
    kernels: Mapping[str, Callable[..., Kernel]],
) -> Kernel | None:
    """The kernel of a merge; `None` where there is none but mergekit's own."""
    tensors = [inputs[model] for model in task.model_order if model in inputs]
    first = tensors[0]
    alike = all(
        each.shape == first.shape and each.dtype == torch.bfloat16 and each.is_contiguous()
        for each in tensors
    )
    kind = kernels.get(task.method_name)
    if kind is None or not alike or len(tensors) < len(task.model_order) or first.numel() == 0:
        return None
    if task.method_name == "linear":
        return kind(task.model_order, tensors)
    others = [model for model in task.model_order if model != task.base_model]
    if task.base_model not in inputs or not others:
        return None
    return kind(others, [inputs[model] for model in others], inputs[task.base_model])


@lru_cache(64)
def _tensor(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


def _sum(rows: torch.Tensor) -> torch.Tensor:
    """`rows.sum(0)`, faster where there are two, which in bfloat16 are rounded once as well."""
    return torch.add(rows[0], rows[1]) if len(rows) == 2 else rows.sum(dim=0)


def _stretches(*tensors: torch.Tensor) -> Iterator[tuple[slice, list[torch.Tensor]]]:
    """Where stretches of tensors of one size are, and each one's."""
    flat = [tensor.view(-1) for tensor in tensors]
    pieces = list(stretches(flat[0]))
    for piece in pieces:
        yield piece, [row[piece] for row in flat] if len(pieces) > 1 else flat
