"""Statistics that merge methods read by path, checked when a merge is planned.

    models:
      - model: chat
        parameters: {statistics: stats/chat}     # written by mergekit-align-stats

A method declares which kind it reads; that each model has it, and that it is the model's own, is
checked before any weight is read. A merge then reads a tensor's statistics as it comes to the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.base import MergeMethod, TensorGroup

from mergekit_align.errors import InputError
from mergekit_align.fingerprint import model_fingerprint
from mergekit_align.merge_methods.roles import MergeConfigError, inputs
from mergekit_align.samples import SampleType
from mergekit_align.statistics.files import Kind, find_statistics

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
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
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
    kind = _declared.get(config.merge_method)
    if kind is None:
        return
    for key, models in inputs(config):
        for model, parameters in models:
            base = model == config.base_model
            given = {name: parameters.get(name) for name in ("statistics", "base_statistics")}
            wanted = {"statistics": model}
            if "base_statistics" in _parameters(config.merge_method):
                assert config.base_model is not None
                wanted = {} if base else {**wanted, "base_statistics": config.base_model}
            samples = []
            for name, owner in wanted.items():
                where = f"{key}: {model}: {name}"
                directory = given[name]
                if not isinstance(directory, str):
                    raise MergeConfigError(
                        f"{where}: found {directory!r}; expected a directory that "
                        f"mergekit-align-stats --kind {kind} has written"
                    )
                try:
                    files = find_statistics(directory, kind)
                except InputError as error:
                    raise MergeConfigError(f"{where}: {error}") from error
                for file in files:
                    if file.header.model != model_fingerprint(owner.model.path):
                        raise MergeConfigError(
                            f"{where}: found statistics of another model in {directory}; expected "
                            f"those of {owner}"
                        )
                samples.append([(file.header.type, file.header.samples) for file in files])
            if samples and samples.count(samples[0]) < len(samples):
                raise MergeConfigError(
                    f"{key}: {model}: base_statistics: found statistics of other samples than its "
                    "statistics'; expected the same"
                )
        _check_layers(config)


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
