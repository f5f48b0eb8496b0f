"""Weights that minimise the merged model's own loss, where LM-Cocktail weighs models by theirs.

The merge is linear in its weights, W = sum over models m of w_m W_m with weights that sum to 1, so
that one forward and one backward pass of the merged model give the loss and, as the inner
products <dL/dW, W_m>, its exact gradient with respect to all weights, one a model or one a group of
layers. (AdaMerging, arXiv 2310.02575, learns such weights by gradient too, from inputs without
answers.) SLSQP (scipy) takes the steps; a floor on a type's mean log-probability is a constraint.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize

from mergekit_align.encoding import EncodedSample
from mergekit_align.errors import InputError
from mergekit_align.gradient import mean_loss
from mergekit_align.samples import SampleType

if TYPE_CHECKING:
    from mergekit.io.lazy_tensor_loader import LazyTensorLoader
    from transformers import PreTrainedModel

Array = NDArray[np.float64]
_LAYER = re.compile(r"\.(\d+)\.")
_TOLERANCE = 1e-4
"""How far below its floor a log-probability may end, nats a token."""


class Point(NamedTuple):
    """Weights, and what the model merged with them makes of the samples."""

    weights: Array
    """[groups, models], each row sums to 1."""
    losses: dict[SampleType, float]
    """Mean loss on the samples of each type, nats a token."""
    gradients: dict[SampleType, Array]
    """Of the losses with respect to the weights, in their shape."""


class Problem:
    """The merged model as a function of its weights.

    Args:
        model: of the models' architecture; its parameters are overwritten.
        sources: the models' tensors, by checkpoint name.
        samples: of each type, as the merged model reads them.
        granularity: layers that share a weight; `None` for one weight a model.

    Raises:
        InputError: a model lacks a tensor.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sources: Sequence[LazyTensorLoader],
        samples: Mapping[SampleType, Sequence[EncodedSample]],
        granularity: int | None,
    ) -> None:
        self._model = model
        self._sources = sources
        self._parameters = dict(model.named_parameters())
        groups = {name: _group(name, granularity) for name in self._parameters}
        self.groups: list[int | None] = sorted(
            set(groups.values()), key=lambda group: (group is None, group)
        )
        """First layer of each group of layers; last, `None`: all other tensors."""
        self._rows = {name: self.groups.index(group) for name, group in groups.items()}
        for name in self._parameters:
            for source in sources:
                if name not in source.index.tensor_paths:
                    raise InputError(
                        f"{source.index.base_path}: found no tensor {name}; expected one, as in "
                        "the other models"
                    )
        self._losses = {kind: mean_loss(model, encoded) for kind, encoded in samples.items()}

    def _tensor(self, source: LazyTensorLoader, name: str) -> torch.Tensor:
        """A model's tensor, where its parameter is, float32."""
        parameter = self._parameters[name]
        tensor: torch.Tensor = source.get_tensor(name, device="cpu")
        if tensor.shape != parameter.shape:
            raise InputError(
                f"{source.index.base_path}: {name}: found shape {tuple(tensor.shape)}; expected "
                f"{tuple(parameter.shape)}"
            )
        return tensor.to(parameter.device, torch.float32)

    def at(self, weights: Array) -> Point:
        """The merged model's losses and gradients at `weights` [groups, models].

        Raises:
            InputError: a model has a tensor in another shape.
        """
        for name, parameter in self._parameters.items():
            merged = torch.zeros_like(parameter, dtype=torch.float32)
            for source, weight in zip(self._sources, weights[self._rows[name]], strict=True):
                merged.add_(self._tensor(source, name), alpha=float(weight))
            parameter.data.copy_(merged)
        losses: dict[SampleType, float] = {}
        gradients: dict[SampleType, Array] = {}
        for kind, loss in self._losses.items():
            self._model.zero_grad()
            losses[kind] = loss.accumulate()
            gradients[kind] = self._products(weights.shape)
        self._model.zero_grad()
        return Point(weights, losses, gradients)

    def _products(self, shape: tuple[int, ...]) -> Array:
        """Inner products of the parameters' gradients with each model's tensors, by group."""
        products = np.zeros(shape)
        for name, parameter in self._parameters.items():
            assert parameter.grad is not None
            gradient = parameter.grad.float().flatten()
            for column, source in enumerate(self._sources):
                tensor = self._tensor(source, name).flatten()
                products[self._rows[name], column] += float(gradient @ tensor)
        return products

    def filters(self) -> list[list[str]]:
        """For each group, what mergekit's filters need to find its tensors by; nothing: the rest."""
        names: list[dict[str, None]] = [{} for _ in self.groups]
        for name, row in self._rows.items():
            found = _LAYER.search(name)
            if self.groups[row] is not None and found is not None:
                names[row][name[: found.end()]] = None
        return [list(each) for each in names]


def solve(
    problem: Problem,
    start: Array,
    type_weights: Mapping[SampleType, float],
    *,
    floors: Mapping[SampleType, float],
    max_steps: int,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[Point, Point]:
    """The merge at `start` [models], and the best one found from there.

    Args:
        type_weights: what each type's mean loss counts.
        floors: mean log-probability (nats/token) of a type's samples that the merge must keep.

    Raises:
        InputError: no merge that was tried keeps the floors.
    """
    shape = (len(problem.groups), len(start))
    tried: dict[bytes, Point] = {}

    def at(flat: Array) -> Point:
        key = flat.tobytes()
        if key not in tried:
            tried[key] = point = problem.at(flat.reshape(shape).copy())
            progress(f"solve: evaluation {len(tried)}, loss {objective(point):.4f}")
        return tried[key]

    def objective(point: Point) -> float:
        return sum(weight * point.losses[kind] for kind, weight in type_weights.items() if weight)

    def gradient(point: Point) -> Array:
        flat = np.zeros(shape)
        for kind, weight in type_weights.items():
            if weight:
                flat += weight * point.gradients[kind]
        return flat.ravel()

    sums = np.kron(np.eye(shape[0]), np.ones(shape[1]))
    constraints = [{"type": "eq", "fun": lambda x: sums @ x - 1, "jac": lambda x: sums}]
    for kind, floor in floors.items():
        constraints.append(
            {
                "type": "ineq",
                "fun": lambda x, kind=kind, floor=floor: -at(x).losses[kind] - floor,
                "jac": lambda x, kind=kind: -at(x).gradients[kind].ravel(),
            }
        )
    first = np.tile(start, shape[0])
    minimize(
        lambda x: objective(at(x)),
        first,
        jac=lambda x: gradient(at(x)),
        method="SLSQP",
        bounds=[(0.0, 1.0)] * first.size,
        constraints=constraints,
        options={"maxiter": max_steps, "ftol": 1e-5},
    )
    points = list(tried.values())
    missed = [
        max((floor + p.losses[kind] for kind, floor in floors.items()), default=0) for p in points
    ]
    kept = [p for p, by in zip(points, missed, strict=True) if by <= _TOLERANCE]
    if not kept:
        nearest = points[missed.index(min(missed))]
        found = ", ".join(f"{kind} {-nearest.losses[kind]:.4f}" for kind in floors)
        wanted = ", ".join(f"{kind} {floor}" for kind, floor in floors.items())
        raise InputError(f"align.floors: found {found} at the nearest; expected {wanted}")
    return points[0], min(kept, key=objective)


def _group(name: str, granularity: int | None) -> int | None:
    """The first layer of a tensor's group; `None` of one that is in no layer."""
    found = _LAYER.search(name)
    if granularity is None or found is None:
        return None
    return int(found.group(1)) // granularity * granularity
