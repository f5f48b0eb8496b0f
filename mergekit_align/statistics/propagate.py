"""Input statistics as RegMean++ wants them (arXiv 2508.03121): of what the merged model passes on.

A layer of each model reads, for that model's samples, what the merged model's earlier layers give; once
its inputs are known the layer is merged, and passes its outputs on to the next.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from mergekit.config import MergeConfiguration

from mergekit_align.checkpoints import context_window, read_checkpoint
from mergekit_align.encoding import ResponseEncoder
from mergekit_align.errors import InputError
from mergekit_align.merge_methods.regmean import OFF_DIAGONAL, regression_mean
from mergekit_align.statistics.collect import (
    Source,
    add_gram,
    check_names,
    header,
    is_there,
    linear_inputs,
    same_inputs,
    watched,
)
from mergekit_align.statistics.files import Accumulators, StatisticsFile, find_statistics
from mergekit_align.yaml_files import as_merge_config, read_yaml_mapping

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Call(NamedTuple):
    """How a decoder layer is called for one sample: all but its first argument, hidden states."""

    rest: tuple[Any, ...]
    keywords: dict[str, Any]


class _Stream:
    """One model's samples of one type, on their way through the merged model."""

    def __init__(
        self, model: int, weight: float, file: StatisticsFile, ids: list[list[int]]
    ) -> None:
        self.model = model
        self.weight = weight
        self.file = file
        self.ids = ids
        self.states: list[torch.Tensor] = []
        self.calls: list[list[_Call]] = []
        """For each sample, one a layer."""


def read_merge(path: str | os.PathLike[str]) -> MergeConfiguration:
    """A mergekit config.

    Raises:
        InputError: it is none.
    """
    return as_merge_config(read_yaml_mapping(path), path)


@torch.no_grad()
def collect_propagated(
    config: MergeConfiguration, progress: Callable[[str], None] = lambda line: None
) -> list[Path]:
    """Write each model's `propagated_gram` statistics beside its `gram` statistics.

    Args:
        config: a merge by `regmean_plus`; its models' `statistics` directories have Gram matrices,
            whose headers say which samples are whose.

    Raises:
        InputError: before any weight is read, where something given cannot be used.
    """
    from transformers import AutoModelForCausalLM

    if config.merge_method != "regmean_plus" or not config.models:
        raise InputError("--merge: expected a config of merge_method regmean_plus with `models:`")
    alignment_weight = _number(config.parameters or {}, "alignment_weight")
    off_diagonal = _number(config.parameters or {}, "off_diagonal", OFF_DIAGONAL)
    streams: list[_Stream] = []
    headers = []
    for index, entry in enumerate(config.models):
        place, parameters = entry.model.model.path, entry.parameters or {}
        weight = _number(parameters, "weight")
        shape, tokenizer = read_checkpoint(place, "models")
        encoder = ResponseEncoder(tokenizer, max_length=context_window(shape))
        for file in find_statistics(str(parameters.get("statistics")), "gram"):
            found = file.header
            source = Source(found.data, found.limit, found.seed)
            samples = source.by_type().get(found.type, [])
            encoded = encoder.encode_samples(samples)
            wanted = header(place, tokenizer, source, found.type, encoded, "propagated_gram")
            is_there(file.path, wanted)
            own = weight * (alignment_weight if found.type == "alignment" else 1.0)
            ids = [[*each.prompt_ids, *each.response_ids] for each in encoded]
            streams.append(_Stream(index, own, file, ids))
            headers.append(wanted._replace(same=found.same))
    models = []
    for entry in config.models:
        place = entry.model.model.path
        models.append(AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval())
        check_names(models[-1], place)
    merged = copy.deepcopy(models[0])
    _average(merged.get_input_embeddings(), [model.get_input_embeddings() for model in models])
    for stream in streams:
        _start(merged, stream)
    layers = [list(model.get_decoder().layers) for model in models]
    merged_layers = list(merged.get_decoder().layers)
    names = {module: name for name, module in merged.named_modules()}
    shapes = {
        name: (width, width)
        for layer, calls in zip(merged_layers, zip(*streams[0].calls[:1], strict=True), strict=True)
        for name, width in _widths(layer, names[layer], streams[0].states[0], calls[0]).items()
    }
    files = [
        Accumulators(stream.file.path.parent, each, shapes)
        for stream, each in zip(streams, headers, strict=True)
    ]
    for number, layer in enumerate(merged_layers):
        progress(f"layer {number + 1} of {len(merged_layers)}")
        prefix = names[layer]
        for stream, grams in zip(streams, files, strict=True):
            _add(layers[stream.model][number], prefix, number, stream, grams)
        _merge(layer, [own[number] for own in layers], prefix, streams, files, off_diagonal)
        for stream in streams:
            stream.states = [
                _output(layer, state, calls[number])
                for state, calls in zip(stream.states, stream.calls, strict=True)
            ]
    return [file.finish() for file in files]


def _number(parameters: dict[str, Any], name: str, default: float = 1.0) -> float:
    value = parameters.get(name, default)
    if not isinstance(value, (int, float)):
        raise InputError(f"{name}: found {value!r}; expected one number for all tensors")
    return float(value)


def _average(target: torch.nn.Module, sources: Sequence[torch.nn.Module]) -> None:
    for own, *others in zip(target.parameters(), *(s.parameters() for s in sources), strict=True):
        own.copy_(torch.stack(others).mean(0))


def _start(merged: PreTrainedModel, stream: _Stream) -> None:
    """A stream's first hidden states, and how each layer is to be called with later ones."""
    calls: list[_Call] = []

    def see(module: Any, args: Any, keywords: dict[str, Any]) -> None:
        state, *rest = args if args else (keywords["hidden_states"],)
        if not calls:
            stream.states.append(state)
        kept = {k: v for k, v in keywords.items() if k != "hidden_states"}
        calls.append(_Call(tuple(rest), kept))

    decoder = merged.get_decoder()
    handles = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in decoder.layers]
    for ids in stream.ids:
        decoder(input_ids=torch.tensor([ids]), use_cache=False)
        stream.calls.append(list(calls))
        calls.clear()
    for handle in handles:
        handle.remove()


def _output(layer: torch.nn.Module, state: torch.Tensor, call: _Call) -> torch.Tensor:
    found = layer(state, *call.rest, **call.keywords)
    output: torch.Tensor = found[0] if isinstance(found, tuple) else found
    return output


def _widths(
    layer: torch.nn.Module, prefix: str, state: torch.Tensor, call: _Call
) -> dict[str, int]:
    _, widths = same_inputs(linear_inputs(layer), lambda: _output(layer, state, call))
    return {f"{prefix}.{name}": width for name, width in widths.items()}


def _add(
    layer: torch.nn.Module, prefix: str, number: int, stream: _Stream, file: Accumulators
) -> None:
    """Add what one model's layer reads of a stream, a token."""
    tokens = sum(len(ids) for ids in stream.ids)

    def see(name: str, inputs: torch.Tensor) -> None:
        gram = file.tensors.get(f"{prefix}.{name}")
        if gram is not None:
            add_gram(gram, inputs / tokens**0.5)

    with watched(linear_inputs(layer), see):
        for state, calls in zip(stream.states, stream.calls, strict=True):
            _output(layer, state, calls[number])


def _merge(
    layer: torch.nn.Module,
    sources: Sequence[torch.nn.Module],
    prefix: str,
    streams: Sequence[_Stream],
    files: Sequence[Accumulators],
    off_diagonal: float,
) -> None:
    """Merge one layer by what is known of its inputs; the rest of it is averaged."""
    _average(layer, sources)
    for name, module in linear_inputs(layer).items():
        own = f"{prefix}.{name}"
        own = streams[0].file.header.same.get(own, own)
        weights = [source.get_parameter(name) for source in sources]
        module.weight.copy_(
            regression_mean(
                [weights[stream.model] for stream in streams],
                [
                    stream.weight * file.tensors[own]
                    for stream, file in zip(streams, files, strict=True)
                ],
                off_diagonal,
            )
        )
