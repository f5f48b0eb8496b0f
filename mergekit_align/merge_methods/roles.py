"""Which part each model plays in a merge that tells its models apart.

    base_model: unaligned            # what the aligned model was made from, or the common ancestor
    models:
      - model: chat
        parameters: {role: aligned}
      - model: medicine
        parameters: {role: expert, weight: 1.0}

A method declares the roles that it needs; whether a config gives each of them is checked when the
merge is planned, before any weight is read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import click
import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.base import MergeMethod, PerInputValues, TensorGroup

from mergekit_align.errors import InputError

Role = Literal["aligned", "expert", "safe"]
Origin = Literal["aligned", "base"]
"""The model that the experts were fine-tuned from."""

_declared: dict[str, frozenset[Role]] = {}


class MergeConfigError(click.ClickException, InputError):
    """A user's mistake in a merge config; a mergekit command prints its line and exits with 2."""

    exit_code = 2


class Parts(NamedTuple):
    """One tensor of each model."""

    base: torch.Tensor
    aligned: torch.Tensor
    experts: list[tuple[torch.Tensor, float]]
    """With their weights."""
    safe: torch.Tensor | None

    @property
    def alignment(self) -> torch.Tensor:
        """What alignment changed: the safety vector, or alignment vector, of the papers."""
        return self.aligned - self.base

    def updates(self, origin: Origin) -> list[tuple[torch.Tensor, float]]:
        """What fine-tuning changed in each expert since its `origin`, with the experts' weights."""
        start = self.aligned if origin == "aligned" else self.base
        return [(expert - start, weight) for expert, weight in self.experts]

    def average(self) -> torch.Tensor:
        """Plain mean of the aligned model and the experts: of what a paper says nothing about."""
        return torch.stack([self.aligned, *(expert for expert, _ in self.experts)]).mean(0)


def needs_roles(method: MergeMethod, roles: Iterable[Role]) -> MergeMethod:
    """Declare the roles without which `method` cannot work."""
    _declared[method.spec.name] = frozenset(roles)
    return method


def arithmetic_dtype(group: TensorGroup) -> torch.dtype:
    """float32, or float64 where the tensors are."""
    return torch.float64 if group.tensors[0].dtype == torch.float64 else torch.float32


def parts(group: TensorGroup, role: PerInputValues[Role], weight: PerInputValues[float]) -> Parts:
    """The tensors of a group by their models' roles, in the floating type of the arithmetic."""
    dtype = arithmetic_dtype(group)
    own = stored_parts(group, role, weight)
    experts = [(tensor.to(dtype), each) for tensor, each in own.experts]
    safe = None if own.safe is None else own.safe.to(dtype)
    return Parts(own.base.to(dtype), own.aligned.to(dtype), experts, safe)


def stored_parts(
    group: TensorGroup, role: PerInputValues[Role], weight: PerInputValues[float]
) -> Parts:
    """The same in the models' own floating type."""
    assert group.base is not None
    single: dict[Role, torch.Tensor] = {}
    experts: list[tuple[torch.Tensor, float]] = []
    for entry in group.non_base:
        if role[entry.id] == "expert":
            experts.append((entry.tensor, weight[entry.id]))
        else:
            single[role[entry.id]] = entry.tensor
    if torch.equal(group.base.tensor, single["aligned"]):
        _warn_of_equal_models()
    return Parts(group.base.tensor, single["aligned"], experts, single.get("safe"))


@lru_cache(1)
def _warn_of_equal_models() -> None:
    """Once a run, not once a tensor."""
    logging.getLogger(__name__).warning(
        "The aligned model equals base_model in some tensors: there is no alignment to keep there."
    )


def check_roles(config: MergeConfiguration) -> None:
    """That a config's models have the roles that its method needs.

    Raises:
        MergeConfigError: a role is missing, unknown, or given to two models.
    """
    for key, models in inputs(config):
        given = [
            (str(model), parameters.get("role"))
            for model, parameters in models
            if model != config.base_model
        ]
        try:
            check_role_names(config.merge_method, given)
        except MergeConfigError as error:
            raise MergeConfigError(f"{key}: {error}") from error


def check_role_names(method: str, given: Iterable[tuple[str, object]]) -> None:
    """That models have the roles that a method needs.

    Args:
        method: name of a merge method, ours or not.
        given: names of the models, the base aside, and what each has for a role.

    Raises:
        MergeConfigError: a role is missing, unknown, or given to two models.
    """
    needed = _declared.get(method)
    if needed is None:
        return
    found: dict[object, list[str]] = {}
    for name, role in given:
        if role not in get_args(Role):
            expected = f"role {', '.join(get_args(Role))}; {method} tells its models apart"
            raise MergeConfigError(f"{name}: found role {role!r}; expected {expected}")
        found.setdefault(role, []).append(name)
    for role in get_args(Role):
        count = len(found.get(role, []))
        if role in needed and not count:
            raise MergeConfigError(f"found no model of role {role}; {method} expects one")
        if role != "expert" and count > 1:
            named = " and ".join(found[role])
            raise MergeConfigError(f"found role {role} for {named}; expected one model of it")


def inputs(
    config: MergeConfiguration,
) -> Iterable[tuple[str, list[tuple[ModelReference, Mapping[str, Any]]]]]:
    """Models that are merged with each other, with their parameters, by their key."""
    outputs = list((config.modules or {}).values()) or [config]
    for output in outputs:
        if output.models:
            yield "models", [(m.model, m.parameters or {}) for m in output.models]
        for index, piece in enumerate(output.slices or []):
            yield (
                f"slices[{index}].sources",
                [(source.model, source.parameters or {}) for source in piece.sources],
            )
