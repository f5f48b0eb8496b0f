"""Losses of one model after another on the same samples: once each, and remembered.

A model is in memory no longer than its samples take, and meanwhile the next one's files are read, so
that they are in the page cache when their turn comes. What a sample scored is kept in the user's cache
as its batch is done, under the content of the model's files, the sample as the model reads it, and
the floating type. Under `accelerate launch` the processes share a model's batches out; as
these do not depend on the number of processes, neither do the losses.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from mergekit.options import MergeOptions
from sqlitedict import SqliteDict

from mergekit_align.checkpoints import context_window
from mergekit_align.devices import (
    check_device,
    default_device,
    default_dtype,
    give_memory_back,
)
from mergekit_align.encoding import EncodedSample, ResponseEncoder
from mergekit_align.fingerprint import digest, lora_cache, reference_fingerprint
from mergekit_align.loss import ResponseReader, questions
from mergekit_align.samples import Sample
from mergekit_align.user_cache import user_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_READ_AHEAD = 2**24


class SampleLoss(NamedTuple):
    """What a model makes of one sample."""

    nll: float
    """Negative log-likelihood of the response, nats: the sum over its tokens."""
    tokens: int
    """Those of the response, the end token included."""


class Precision(NamedTuple):
    """Where and in what floating type models compute."""

    device: str
    """As torch names it, or `auto`: spread over all GPUs."""
    dtype: str

    @classmethod
    def of(cls, device: str | None, dtype: str | None) -> Precision:
        """What the user says, defaults filled in; under `accelerate launch` a device a process.

        Raises:
            InputError: there is no such device.
        """
        state = PartialState()
        if device is None:
            device = str(state.device) if state.num_processes > 1 else default_device()
        if device != "auto":
            check_device(device, "align.device")
        chosen = default_dtype("cuda" if device == "auto" else device)
        return cls(device, dtype or str(chosen).removeprefix("torch."))


class Models:
    """The models of a cocktail, loaded one at a time.

    Args:
        options: mergekit's, where they say how models are found and loaded.
    """

    def __init__(self, precision: Precision, options: MergeOptions) -> None:
        self.precision = precision
        self.options = options
        self._reader = ThreadPoolExecutor(1)

    def directory(self, model: ModelReference) -> str:
        """Where its files are; a LoRA is merged and a hub's model fetched first."""
        merged = model.merged(
            self.options.lora_merge_cache,
            self.options.trust_remote_code,
            self.options.lora_merge_dtype,
        )
        return str(merged.local_path(self.options.transformers_cache))

    def tensors(self, model: ModelReference) -> LazyTensorLoader:
        """Its tensors, read one at a time."""
        return LazyTensorLoader(ShardedTensorIndex.from_disk(self.directory(model)))

    def load(self, model: ModelReference) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        with PartialState().main_process_first():  # a LoRA is merged once, on disk
            place = self.directory(model)
        device, dtype = self.precision
        if device == "cuda" and _weight_bytes(place) > torch.cuda.mem_get_info()[0]:
            device = "auto"
        loaded = AutoModelForCausalLM.from_pretrained(
            place,
            dtype=getattr(torch, dtype),
            trust_remote_code=self.options.trust_remote_code,
            device_map="auto" if device == "auto" else None,
        )
        ready: PreTrainedModel = (loaded if device == "auto" else loaded.to(device)).eval()
        return ready

    def read_ahead(self, model: ModelReference) -> None:
        """Fetch and read a model's files in the background; a LoRA's base is left for its turn."""

        def read() -> None:
            buffer = bytearray(_READ_AHEAD)
            for file in _weight_files(self.directory(model)):
                with file.open("rb", buffering=0) as source:
                    while source.readinto(buffer):
                        pass

        if model.lora is None:
            self._reader.submit(read)


def with_lora_cache(options: MergeOptions, config: MergeConfiguration) -> MergeOptions:
    """mergekit's options, by which a LoRA that is merged to be weighed is found again by the merge."""
    with_lora = [each for each in config.referenced_models() if each.lora is not None]
    if options.lora_merge_cache or not with_lora:
        return options
    place = lora_cache(user_cache("lora"), with_lora)
    return options.model_copy(update={"lora_merge_cache": place})


def sample_losses(
    references: Sequence[ModelReference],
    tokenizers: Sequence[PreTrainedTokenizerBase],
    samples: Sequence[Sample],
    models: Models,
    *,
    max_batch_size: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[list[SampleLoss]]:
    """The loss of each sample under each model.

    Args:
        references: the models, in the order of `tokenizers`.
        cache: directory of what was computed before; `None` for the user's cache.

    Raises:
        InputError: a response does not fit into a model's context window.
    """
    directory = Path(cache) if cache is not None else user_cache("losses")
    directory.mkdir(parents=True, exist_ok=True)
    with SqliteDict(str(directory / "losses.sqlite")) as known:
        tables = [
            _Table(reference, encode(samples, tokenizer, reference, models), models, known)
            for reference, tokenizer in zip(references, tokenizers, strict=True)
        ]
        missing = [table for table in tables if table.missing]
        for table, following in zip_longest(missing, missing[1:]):
            progress(f"{table.reference}: reading {len(table.missing)} samples")
            model = models.load(table.reference)
            if following is not None:
                models.read_ahead(following.reference)
            table.complete(model, max_batch_size)
            del model
            give_memory_back()
        return [table.losses() for table in tables]


def encode(
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    reference: ModelReference,
    models: Models,
) -> list[EncodedSample]:
    """Samples as a model reads them.

    Raises:
        InputError: a response does not fit into the model's context window.
    """
    config = reference.config(models.options.trust_remote_code)
    return ResponseEncoder(tokenizer, max_length=context_window(config)).encode_samples(samples)


class _Table:
    """One model's losses by sample, as far as they are known."""

    def __init__(
        self,
        reference: ModelReference,
        encoded: Sequence[EncodedSample],
        models: Models,
        known: SqliteDict,
    ) -> None:
        self.reference = reference
        device, dtype = models.precision
        model = [reference_fingerprint(reference), dtype, device.partition(":")[0]]
        self._keys = [digest([*model, *each]) for each in encoded]
        self._known = known
        self._found: dict[str, SampleLoss] = {
            key: SampleLoss(*known[key]) for key in self._keys if key in known
        }
        self.missing = {
            key: each
            for key, each in zip(self._keys, encoded, strict=True)
            if key not in self._found
        }

    def complete(self, model: PreTrainedModel, max_batch_size: int | None) -> None:
        """Find what is missing; the first process writes it down, a round of batches at a time."""
        state = PartialState()
        keys = list(self.missing)
        asked = questions(list(self.missing.values()))
        reader = ResponseReader(model, asked, max_batch_size=max_batch_size)
        for start in range(0, len(reader.batches), state.num_processes):
            mine = start + state.process_index
            scores: list[tuple[str, SampleLoss]] = []
            if mine < len(reader.batches):
                places, found = reader.batches[mine].queries, reader.read(mine).each()
                for place, score in zip(places, found, strict=True):
                    scores.append((keys[place], SampleLoss(-score.logprob, score.tokens)))
            if state.num_processes > 1:
                scores = gather_object(scores)
            self._found.update(scores)
            if state.is_main_process:
                self._known.update({key: tuple(loss) for key, loss in scores})
                self._known.commit()

    def losses(self) -> list[SampleLoss]:
        return [self._found[key] for key in self._keys]


def _weight_files(directory: str) -> list[Path]:
    return sorted(f for f in Path(directory).iterdir() if f.suffix in (".safetensors", ".bin"))


def _weight_bytes(directory: str) -> int:
    return sum(file.stat().st_size for file in _weight_files(directory))
