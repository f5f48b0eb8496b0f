"""Whether a search fits into memory, told before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch

from mergekit_align.errors import InputError
from mergekit_align.evolve.config import EvolveConfig


class Memory(NamedTuple):
    """Bytes that a search needs; 0 where its models' files are not here yet."""

    model: int
    """The model that candidates are merged into."""
    inputs: int
    """The models that are merged, once."""

    @property
    def total(self) -> int:
        return round(1.1 * (self.model + self.inputs))


def memory_needed(config: EvolveConfig) -> Memory:
    """An estimate from the models' files: what is read of a batch of samples counts a tenth."""
    genome = config.file.config.genome
    models = dict.fromkeys([*genome.models, *([genome.base_model] if genome.base_model else [])])
    sizes = [_weights(Path(model.model.path)) for model in models]
    numbers = max((count for count, _ in sizes), default=0)
    return Memory(numbers * config.dtype.itemsize, sum(size for _, size in sizes))


def check_memory(config: EvolveConfig) -> None:
    """That a search fits.

    Raises:
        InputError: it does not; says how much it needs.
    """
    need = memory_needed(config).total
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


def _weights(directory: Path) -> tuple[int, int]:
    """How many numbers a model's files hold, and their bytes in bfloat16, in which mergekit merges."""
    count = 0
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                count += torch.Size(tensor["shape"]).numel()
    return count, 2 * count
