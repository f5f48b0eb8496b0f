"""Statistics of a model on samples: one pass computes all kinds that are asked for.

A sample is read by itself, for importance and Fisher information are means over samples of what is not
linear in the gradient. A parameter's gradient is added to the statistics and dropped as soon as the
backward pass has it, so that memory holds the model, one sample's activations, and what the system
keeps of the files that the statistics are added to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mergekit_align.checkpoints import context_window, read_checkpoint
from mergekit_align.devices import check_device, default_device
from mergekit_align.encoding import EncodedSample, ResponseEncoder
from mergekit_align.errors import InputError
from mergekit_align.fingerprint import digest, model_fingerprint
from mergekit_align.gradient import sample_loss
from mergekit_align.samples import SAMPLE_TYPES, Sample, SampleType, limit_samples, load_samples
from mergekit_align.statistics.files import Accumulators, Header, Kind, StatisticsFile
from mergekit_align.stretches import stretches

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

File = str | os.PathLike[str]


class Source(NamedTuple):
    """Samples as a user names them."""

    data: Sequence[File]
    limit: int | None = None
    """Samples of each type at most; drawn by `seed`."""
    seed: int = 0

    def by_type(self) -> dict[SampleType, list[Sample]]:
        """The samples of each type that there is.

        Raises:
            InputError: a file cannot be read.
        """
        every = [sample for file in self.data for sample in load_samples(file)]
        samples = limit_samples(every, self.limit, self.seed)
        kinds = [kind for kind in SAMPLE_TYPES if any(s.type == kind for s in samples)]
        return {kind: [s for s in samples if s.type == kind] for kind in kinds}


def collect_statistics(
    model: str,
    source: Source,
    out: File,
    *,
    kinds: Sequence[Kind] = ("gram",),
    types: Sequence[SampleType] = (),
    device: str | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Write a model's statistics on samples to the directory `out`; files that are there stay.

    Args:
        model: a directory or a hub name.
        kinds: of statistics; see `Kind`.
        types: of samples; all that there are by default.

    Returns:
        The files, one for each type and kind.

    Raises:
        InputError: before the weights are read, where something given cannot be used.
    """
    from transformers import AutoModelForCausalLM

    device = device or default_device()
    check_device(device, "--device")
    config, tokenizer = read_checkpoint(model, "MODEL")
    samples = source.by_type()
    for kind in types:
        if kind not in samples:
            raise InputError(f"--type: found no sample of type {kind} in --data; expected some")
    encoder = ResponseEncoder(tokenizer, max_length=context_window(config))
    encoded = {kind: encoder.encode_samples(samples[kind]) for kind in types or samples}
    wanted = [
        (kind, header(model, tokenizer, source, type_, each, kind))
        for type_, each in encoded.items()
        for kind in kinds
    ]
    paths = [Path(out) / f"{each.type}.{kind}.safetensors" for kind, each in wanted]
    missing = [
        each for each, path in zip(wanted, paths, strict=True) if not is_there(path, each[1])
    ]
    if missing:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device).eval()
        check_names(loaded, model)
        for type_ in dict.fromkeys(each.type for _, each in missing):
            progress(f"{model}: {len(encoded[type_])} samples of type {type_}")
            headers = {kind: each for kind, each in missing if each.type == type_}
            _collect(loaded, encoded[type_], headers, Path(out))
    return paths


def header(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    type_: SampleType,
    encoded: Sequence[EncodedSample],
    kind: Kind,
) -> Header:
    """What statistics of `kind` belong to; which layers share an input is not known yet."""
    return Header(
        model=model_fingerprint(model),
        samples=digest([list(each) for each in encoded])[:16],
        template=digest(tokenizer.chat_template)[:16],
        data=[os.fspath(file) for file in source.data],
        limit=source.limit,
        seed=source.seed,
        type=type_,
        kind=kind,
        same={},
    )


def is_there(path: Path, wanted: Header) -> bool:
    """Whether a file has these statistics.

    Raises:
        InputError: it has others.
    """
    if not path.exists():
        return False
    found = StatisticsFile(path).header
    for what in ("model", "samples", "template"):
        if getattr(found, what) != getattr(wanted, what):
            raise InputError(
                f"{path}: found statistics of another {what.removesuffix('s')}; expected those "
                "of this run, or a directory of their own"
            )
    return True


def check_names(model: PreTrainedModel, place: str) -> None:
    """That a model's parameters have in memory the names that they have in its checkpoint.

    Raises:
        InputError: they have not, as where a library fuses a checkpoint's tensors.
    """
    from mergekit.common import ModelReference
    from mergekit.io.lazy_tensor_loader import ShardedTensorIndex

    local = ModelReference.parse(place).local_path()
    known = ShardedTensorIndex.from_disk(str(local)).tensor_paths
    for name, _ in model.named_parameters():
        if name not in known:
            raise InputError(
                f"{place}: found no tensor {name} in the checkpoint; expected the names that the "
                "model has in memory (mixtures of experts, whose tensors are fused, have others)"
            )


def linear_inputs(model: torch.nn.Module, skip: object = None) -> dict[str, torch.nn.Linear]:
    """Linear layers of a model by the name of their weight."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not skip
    }


@contextmanager
def watched(
    layers: Mapping[str, torch.nn.Linear], see: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Within it, `see` is told of every input of the layers [tokens, in], in one batch."""

    def hook(name: str) -> Callable[[torch.nn.Module, Any], None]:
        return lambda module, inputs: see(name, inputs[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def same_inputs(
    layers: Mapping[str, torch.nn.Linear], run: Callable[[], object]
) -> tuple[dict[str, str], dict[str, int]]:
    """Layers that read what an earlier one reads, and the width of what the others read."""
    seen: list[tuple[str, torch.Tensor]] = []  # kept, so that no two are one object in turn
    same: dict[str, str] = {}
    widths: dict[str, int] = {}

    def see(name: str, inputs: torch.Tensor) -> None:
        known = next((other for other, tensor in seen if tensor is inputs), None)
        if known is not None:
            same[name] = known
        else:
            seen.append((name, inputs))
            widths[name] = inputs.shape[-1]

    with torch.no_grad(), watched(layers, see):
        run()
    return same, widths


def add_gram(gram: torch.Tensor, inputs: torch.Tensor) -> None:
    """Add x^T x of inputs [..., tokens, in] to `gram` [in, in], a CPU's."""
    rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
    gram.add_((rows.T @ rows).cpu())


def _collect(
    model: PreTrainedModel,
    encoded: Sequence[EncodedSample],
    headers: Mapping[Kind, Header],
    out: Path,
) -> None:
    """Statistics of one sample type, of all kinds that `headers` has."""
    parameters = dict(model.named_parameters())
    files: dict[Kind, Accumulators] = {}
    layers: dict[str, torch.nn.Linear] = {}
    for kind, own in headers.items():
        shapes: dict[str, Sequence[int]] = {name: p.shape for name, p in parameters.items()}
        if kind == "gram":
            layers = linear_inputs(model, model.get_output_embeddings())
            same, widths = same_inputs(layers, lambda: sample_loss(model, encoded[0]))
            own = own._replace(same=same)
            shapes = {name: (width, width) for name, width in widths.items()}
            layers = {name: layers[name] for name in widths}
        files[kind] = Accumulators(out, own, shapes)
    by_gradient = [kind for kind in ("importance", "fisher") if kind in files]

    def take(parameter: torch.nn.Parameter, name: str) -> None:
        assert parameter.grad is not None
        own, gradient = parameter.detach().reshape(-1), parameter.grad.reshape(-1)
        sums = {kind: files[kind].tensors[name].view(-1) for kind in by_gradient}
        for piece in stretches(gradient):
            slope = gradient[piece]
            for kind, total in sums.items():
                seen = (own[piece] * slope).abs() if kind == "importance" else slope.square()
                total[piece].add_(seen.cpu(), alpha=1 / len(encoded))
        parameter.grad = None

    handles = [
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: take(p, name))
        for name, parameter in parameters.items()
        if by_gradient
    ]
    tokens = sum(sum(each.lengths) for each in encoded)
    with watched(layers, lambda name, x: add_gram(files["gram"].tensors[name], x)):
        for each in encoded:
            with torch.set_grad_enabled(bool(by_gradient)):
                loss = sample_loss(model, each)
            if by_gradient:
                loss.backward()  # type: ignore[no-untyped-call]
    for handle in handles:
        handle.remove()
    if "gram" in files:
        for gram in files["gram"].tensors.values():
            gram /= tokens
    for file in files.values():
        file.finish()
