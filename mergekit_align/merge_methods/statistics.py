"""Statistics that merge methods read by path, checked when a merge is planned.

    models:
      - model: chat
        parameters: {statistics: stats/chat}     # written by mergekit-align-stats

A method declares which kind it reads; that each model has it, and that it is the model's own, is
checked before any weight is read. A merge then reads a tensor's statistics as it comes to the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.base import MergeMethod, TensorGroup

from mergekit_align.errors import InputError
from mergekit_align.fingerprint import model_fingerprint
from mergekit_align.merge_methods.roles import MergeConfigError, arithmetic_dtype, inputs
from mergekit_align.samples import SampleType
from mergekit_align.statistics.files import Kind, StatisticsFile, find_statistics

_declared: dict[str, Kind] = {}


def needs_statistics(method: MergeMethod, kind: Kind) -> MergeMethod:
    """Declare that `method` reads statistics of `kind`."""
    _declared[method.spec.name] = kind
    return method


def read_statistics(
    directory: str,
    kind: Kind,
    group: TensorGroup,
    weights: Mapping[SampleType, float] | None = None,
) -> torch.Tensor | None:
    """Statistics of a group's tensor, summed over sample types by their weights, 1 by default.

    `None` where the tensor has none: it is no linear layer's, or was tied to another.
    """
    tensor = group.tensors[0]
    dtype = arithmetic_dtype(group)
    total: torch.Tensor | None = None
    for file in find_statistics(directory, kind):
        name = group.metadata.name
        weight = (weights or {}).get(file.header.type, 1.0)
        if name is not None and name in file:
            own = weight * file[name].to(tensor.device, dtype)
            total = own if total is None else total + own
    return total


def check_statistics(config: MergeConfiguration) -> None:
    """That a config's models have the statistics that its method reads, and that they are theirs.

    Raises:
        MergeConfigError: some are missing, cut short, or another model's or other samples'.
    """
    if config.merge_method not in _declared:
        return
    for key, models in inputs(config):
        own = [(model, each) for model, each in models if model != config.base_model]
        try:
            check_statistics_of(config.merge_method, own, config.base_model)
        except MergeConfigError as error:
            raise MergeConfigError(f"{key}: {error}") from error
    _check_layers(config)


def check_statistics_of(
    method: str,
    models: Sequence[tuple[ModelReference, Mapping[str, object]]],
    base: ModelReference | None,
) -> None:
    """That models have the statistics that a method reads, and that they are theirs.

    Args:
        method: name of a merge method, ours or not.
        models: with their parameters; the base aside.

    Raises:
        MergeConfigError: some are missing, cut short, or another model's or other samples'.
    """
    kind = _declared.get(method)
    if kind is None:
        return
    for model, parameters in models:
        owners = {"statistics": model}
        if "base_statistics" in _parameters(method) and base is not None:
            owners["base_statistics"] = base
        samples = []
        for name, owner in owners.items():
            files = _files(f"{model}: {name}", parameters.get(name), kind, owner)
            samples.append([(file.header.type, file.header.samples) for file in files])
        if samples.count(samples[0]) < len(samples):
            raise MergeConfigError(
                f"{model}: base_statistics: found statistics of other samples than its "
                "statistics'; expected the same"
            )


def _files(
    where: str, directory: object, kind: Kind, owner: ModelReference
) -> list[StatisticsFile]:
    if not isinstance(directory, str):
        raise MergeConfigError(
            f"{where}: found {directory!r}; expected a directory that mergekit-align-stats --kind "
            f"{kind} has written"
        )
    try:
        files = find_statistics(directory, kind)
    except InputError as error:
        raise MergeConfigError(f"{where}: {error}") from error
    for file in files:
        if file.header.model != model_fingerprint(owner.model.path):
            raise MergeConfigError(
                f"{where}: found statistics of another model in {directory}; expected those of "
                f"{owner}"
            )
    return files


def _parameters(method: str) -> list[str]:
    from mergekit.merge_methods import get

    return [parameter.name for parameter in get(method).spec.parameters]


def _check_layers(config: MergeConfiguration) -> None:
    """That no slice moves a layer, for statistics are found by the merged tensor's name."""
    layer = 0
    for index, piece in enumerate(config.slices or []):
        for source in piece.sources:
            if source.layer_range[0] != layer:
                raise MergeConfigError(
                    f"slices[{index}].sources: {source.model}: layer_range: found "
                    f"{list(source.layer_range)}; expected one that begins at {layer}: statistics "
                    "are of layers in their places"
                )
        layer += piece.sources[0].layer_range[1] - piece.sources[0].layer_range[0]
