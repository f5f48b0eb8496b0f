"""Whether a search fits into memory, told before anything is loaded."""

from __future__ import annotations

import json
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import NamedTuple

import torch
from mergekit.common import ModelPath

from mergekit_align import scale
from mergekit_align.errors import InputError
from mergekit_align.evolve.config import EvolveConfig


class Memory(NamedTuple):
    """Bytes that a search needs; 0 where its models' files are not here yet."""

    model: int
    """The model that candidates are merged into, and a teacher of it."""
    inputs: int
    """The models that are merged, once."""
    batch: int
    """What grows with a batch of samples, and the gradients where the search takes them."""

    @property
    def total(self) -> int:
        return self.model + self.inputs + self.batch


def memory_needed(config: EvolveConfig) -> Memory:
    """An estimate from the models' files and, for samples of usual lengths, by `scale`."""
    genome = config.file.config.genome
    models = dict.fromkeys([*genome.models, *([genome.base_model] if genome.base_model else [])])
    sizes = [_weights(_directory(model.model)) for model in models]
    numbers = max((count for count, _ in sizes), default=0)
    batch = _batch(config, next(iter(models)).model.path) if numbers else 0
    at_once = 2 if config.distillation is not None else 1  # a teacher, before the first candidate
    return Memory(at_once * numbers * config.dtype.itemsize, sum(size for _, size in sizes), batch)


def _batch(config: EvolveConfig, model: str) -> int:
    """Bytes that reading a batch of samples takes beside the model."""
    from transformers import AutoConfig

    shape, own = scale.Shape.of(AutoConfig.from_pretrained(model)), config.dtype.itemsize
    # How fast the machine is does not matter here.
    machine = scale.Machine(inf, inf, inf, inf, inf, itemsize=own)
    step = scale.gradient if config.by_gradient else scale.loss
    return round(step(shape, scale.Work(), machine).bytes) - shape.parameters * own


def check_memory(config: EvolveConfig, needed: Memory | None = None) -> None:
    """That a search fits.

    Args:
        needed: what it needs, where that is known.

    Raises:
        InputError: it does not; says how much it needs.
    """
    need = (needed or memory_needed(config)).total
    free = _free(config.device)
    if need > free:
        raise InputError(
            f"{config.path}: found {free / 2**30:.1f} GiB of free memory on {config.device}; expected "
            f"{need / 2**30:.1f} for the model and its inputs"
        )


def _free(device: str) -> int:
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def _directory(model: ModelPath) -> Path:
    """Where a model's files are, or would be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    place = Path(model.path)
    if not place.is_dir():
        with suppress(LocalEntryNotFoundError, HFValidationError):
            place = Path(
                snapshot_download(model.path, revision=model.revision, local_files_only=True)
            )
    return place


def _weights(directory: Path) -> tuple[int, int]:
    """How many numbers a model's files hold, and their bytes in bfloat16, in which mergekit merges."""
    count = 0
    if not any(directory.glob("*.safetensors")):  # an older format, in half precision as a rule
        count = sum(file.stat().st_size for file in directory.glob("*.bin")) // 2
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                count += torch.Size(tensor["shape"]).numel()
    return count, 2 * count
