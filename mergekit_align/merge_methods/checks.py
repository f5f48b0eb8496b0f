"""A merge config by one of our methods, checked before any weight is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, MergeConfiguration
from mergekit.io.lazy_tensor_loader import ShardedTensorIndex
from mergekit.merge_methods.base import BasePolicy, MergeMethod
from pydantic import ValidationError

from mergekit_align.merge_methods.roles import MergeConfigError, check_roles, inputs
from mergekit_align.merge_methods.statistics import check_statistics


def check_merge(config: MergeConfiguration) -> None:
    """That a config has what its method needs, where the method is ours.

    Raises:
        MergeConfigError: no base, a value out of its range, a wrong role, statistics that are missing
            or another model's, a tensor that not all models have.
    """
    from mergekit_align.merge_methods.methods import METHODS

    method = next((own for own in METHODS if own.spec.name == config.merge_method), None)
    if method is None:
        return
    if method.spec.contract.base == BasePolicy.REQUIRED and config.base_model is None:
        raise MergeConfigError(
            f"base_model: found none; {method.spec.name} expects one, the models' common ancestor"
        )
    check_roles(config)
    _check_values(config, method)
    check_statistics(config)
    _check_tensors(config)


def _check_values(config: MergeConfiguration, method: MergeMethod) -> None:
    places: list[tuple[str, Any]] = [("parameters", config.parameters)]
    places += [
        (f"slices[{index}].parameters", piece.parameters)
        for index, piece in enumerate(config.slices or [])
    ]
    for key, models in inputs(config):
        places += [(f"{key}: {model}: parameters", parameters) for model, parameters in models]
    known = {parameter.name: parameter for parameter in method.spec.parameters}
    for where, parameters in places:
        for name, setting in (parameters or {}).items():
            for value in _values(setting) if name in known else ():
                try:
                    known[name].validate(value)
                except ValidationError as error:
                    reason = error.errors()[0]["msg"].removeprefix("Input should be ")
                    raise MergeConfigError(
                        f"{where}: {name}: found {value!r}; expected {reason}"
                    ) from error


def _values(setting: object) -> Iterator[object]:
    """The values that a parameter has: one, a gradient over layers, or one a filter."""
    if isinstance(setting, ConditionalParameter):
        yield from _values(setting.value)
    elif isinstance(setting, (list, tuple)):
        for each in setting:
            yield from _values(each)
    else:
        yield setting


def _check_tensors(config: MergeConfiguration) -> None:
    """That the models, where they are directories, have tensors of the same names."""
    models = {model for _, entries in inputs(config) for model, _ in entries}
    if config.base_model is not None:
        models.add(config.base_model)
    names = {
        model: set(ShardedTensorIndex.from_disk(model.model.path).tensor_paths)
        for model in sorted(models, key=str)
        if _is_plain(model)
    }
    for model, own in names.items():
        for other, others in names.items():
            for name in sorted(own - others):
                raise MergeConfigError(
                    f"models: found tensor {name} in {model} and not in {other}; "
                    f"{config.merge_method} expects it in all models"
                )


def _is_plain(model: ModelReference) -> bool:
    """Whether a model's own files are what is merged: no LoRA comes on top, and they are here."""
    return model.lora is None and os.path.isdir(model.model.path)
