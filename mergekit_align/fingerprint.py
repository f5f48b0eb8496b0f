"""What tells one model's files from another's."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergekit.common import ModelReference

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt")
_LARGE = 64 * 2**20


def model_fingerprint(model: str) -> str:
    """A short digest of a model's directory, or of its hub name.

    Files count by their content; weights of more than 64 MiB by size and time of change, so that a
    large model costs nothing.
    """
    found = hashlib.sha256()
    directory = Path(model)
    if not directory.is_dir():
        found.update(model.encode())
        return found.hexdigest()[:16]
    for file in sorted(path for path in directory.iterdir() if path.is_file()):
        found.update(file.name.encode())
        stat = file.stat()
        if file.suffix in _WEIGHTS and stat.st_size > _LARGE:
            found.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
        else:
            found.update(file.read_bytes())
    return found.hexdigest()[:16]


def commit(model: str, revision: str = "main", *, file: str = "config.json") -> str | None:
    """The commit of a model of the hub, which moves on under the same name; `None` of a directory.

    `file` is one that the model has.
    """
    from transformers.utils.hub import cached_file, extract_commit_hash

    if os.path.isdir(model):
        return None
    found: str | None = extract_commit_hash(cached_file(model, file, revision=revision), None)
    return found


def reference_fingerprint(reference: ModelReference) -> list[str | None]:
    """What tells a model, and its LoRA, from others."""
    parts: list[str | None] = []
    places = [(reference.model, "config.json"), (reference.lora, "adapter_config.json")]
    for place, file in places:
        if place is not None:
            revision = commit(place.path, place.revision or "main", file=file)
            parts += [model_fingerprint(place.path), revision]
    return parts


def lora_cache(place: Path, references: Iterable[ModelReference]) -> str:
    """Where mergekit may keep these models with their LoRAs merged.

    mergekit knows a merged model by its path alone, which another one may have later.
    """
    return str(place / digest([reference_fingerprint(each) for each in references])[:16])


def digest(content: object) -> str:
    """Of anything that JSON can say."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
