"""What tells one model's files from another's."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt")
_LARGE = 64 * 2**20


def model_fingerprint(model: str) -> str:
    """A short digest of a model's directory, or of its hub name.

    Files count by their content; weights of more than 64 MiB by size and time of change, so that a
    large model costs nothing.
    """
    digest = hashlib.sha256()
    directory = Path(model)
    if not directory.is_dir():
        digest.update(model.encode())
        return digest.hexdigest()[:16]
    for file in sorted(path for path in directory.iterdir() if path.is_file()):
        digest.update(file.name.encode())
        stat = file.stat()
        if file.suffix in _WEIGHTS and stat.st_size > _LARGE:
            digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
        else:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def commit(model: str, revision: str = "main", *, file: str = "config.json") -> str | None:
    """The commit of a model of the hub, which moves on under the same name; `None` of a directory.

    `file` is one that the model has.
    """
    from transformers.utils.hub import cached_file, extract_commit_hash

    if os.path.isdir(model):
        return None
    found: str | None = extract_commit_hash(cached_file(model, file, revision=revision), None)
    return found
