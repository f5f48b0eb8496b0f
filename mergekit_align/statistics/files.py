"""Statistics on disk: a directory a model, in it a safetensors file for each sample type and kind.

    stats/aligned/alignment.gram.safetensors
    stats/aligned/benign.importance.safetensors

Tensors have the names that they have in the checkpoint, which are mergekit's. The file's header says
which model, samples and chat template they belong to. While they are being collected a file's tensors
are mapped into memory under another name, so that the system writes them out as it needs the room; the
file gets its name when it is whole.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from mergekit_align.errors import InputError
from mergekit_align.samples import SampleType

Kind = Literal["importance", "fisher", "gram", "propagated_gram"]
"""Mean |theta * grad|; mean grad^2; mean x x^T of a linear layer's inputs, a token; the same with the
inputs that the merged model's earlier layers give."""


class Header(NamedTuple):
    """What a file of statistics belongs to."""

    model: str
    """Fingerprint of the model that they are of."""
    samples: str
    """Digest of the samples, as the model reads them."""
    template: str
    """Digest of the chat template."""
    data: list[str]
    """Files of the samples."""
    limit: int | None
    """Samples of a type at most, drawn by `seed`."""
    seed: int
    type: SampleType
    kind: Kind
    same: dict[str, str]
    """Tensors whose statistics are another's: layers that read the same."""


class StatisticsFile:
    """A whole file of statistics; tensors are read one at a time.

    Raises:
        InputError: the file is no such file, or is cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                self.names: frozenset[str] = frozenset(file.keys())
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path}: found no whole file of statistics ({error}); expected one that "
                "mergekit-align-stats has written"
            ) from error
        if "statistics" not in metadata:
            raise InputError(
                f"{path}: found a safetensors file without statistics' header; expected one that "
                "mergekit-align-stats has written"
            )
        self.header = Header(**json.loads(metadata["statistics"]))

    def __contains__(self, name: str) -> bool:
        return self.header.same.get(name, name) in self.names

    def __getitem__(self, name: str) -> torch.Tensor:
        """Statistics of one of the model's tensors, float32."""
        with safe_open(self.path, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(self.header.same.get(name, name))
        return tensor


def find_statistics(directory: str | os.PathLike[str], kind: Kind) -> list[StatisticsFile]:
    """A model's statistics of one kind, a file for each sample type that has them.

    Raises:
        InputError: there are none, or one is cut short.
    """
    paths = [Path(directory) / f"{each}.{kind}.safetensors" for each in get_args(SampleType)]
    found = [StatisticsFile(path) for path in paths if path.exists()]
    if not found:
        raise InputError(
            f"{os.fspath(directory)}: found no statistics of kind {kind}; expected TYPE.{kind}."
            f"safetensors (mergekit-align-stats --kind {kind})"
        )
    return found


class Accumulators:
    """Tensors of float32 zeros in a file that is being written, to be added to in place.

    Args:
        directory: where the file will be.
        shapes: of the tensors, by name.
    """

    def __init__(
        self, directory: Path, header: Header, shapes: Mapping[str, Sequence[int]]
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / f"{header.type}.{header.kind}.safetensors"
        self._beside = self._path.with_name(f".{self._path.name}")
        content: dict[str, Any] = {
            "__metadata__": {"statistics": json.dumps(header._asdict()), "format": "pt"}
        }
        offset = 0
        places: dict[str, tuple[int, Sequence[int]]] = {}
        for name, shape in shapes.items():
            size = 4 * math.prod(shape)
            content[name] = {
                "dtype": "F32",
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            places[name] = (offset, shape)
            offset += size
        text = json.dumps(content).encode()
        text += b" " * (-len(text) % 8)  # safetensors wants the data aligned
        start = 8 + len(text)
        with self._beside.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(start + offset)
        self._maps = {
            name: np.memmap(
                self._beside, np.float32, "r+", offset=start + place, shape=tuple(shape) or (1,)
            )
            for name, (place, shape) in places.items()
        }
        self.tensors: dict[str, torch.Tensor] = {
            name: torch.from_numpy(array).reshape(tuple(places[name][1]))
            for name, array in self._maps.items()
        }

    def finish(self) -> Path:
        """Give the file its name; nothing may be added after."""
        for array in self._maps.values():
            array.flush()
        self.tensors.clear()
        self._maps.clear()
        os.replace(self._beside, self._path)
        return self._path
