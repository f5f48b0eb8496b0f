"""Prompt/response samples, tagged `alignment`, `task` or `benign`: load, check, split, save.

The response of an `alignment` sample is what a safe model should say to an unsafe prompt (a refusal,
usually); of a `task` sample, what the expert says; of a `benign` sample (a harmless prompt that may
look unsafe), a helpful answer.

Three formats are read: JSON Lines, a JSON list, and a directory that `datasets` saved.
"""

from __future__ import annotations

import json
import os
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from mergekit_align.errors import InputError, closest
from mergekit_align.files import write_text

SampleType = Literal["alignment", "task", "benign"]
SAMPLE_TYPES: tuple[SampleType, ...] = get_args(SampleType)


class Sample(BaseModel):
    """One prompt and the response that is wanted of a merged model."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    prompt: str
    """What the user says: one turn of plain text, without a chat template."""
    response: str
    """What the model should say. The empty string is a legitimate answer."""
    type: SampleType
    """What the sample measures."""
    source: str | None = None
    """Where it came from: a dataset, a model, a grammar."""
    category: str | None = None
    """What it is about; splits are stratified by it."""


def load_samples(path: str | os.PathLike[str]) -> list[Sample]:
    """Samples of a JSONL file, a JSON list, or a directory written by `Dataset.save_to_disk`.

    Raises:
        InputError: nothing is there, nothing is in it, it is not UTF-8 or not JSON, or a sample is
            malformed; names the file, the line (or the position in the list) and the field.
    """
    samples = [_sample(row, where) for where, row in read_rows(Path(path))]
    if not samples:
        raise InputError(f"{path}: found no samples; expected at least one")
    return samples


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a JSONL file, a JSON list or a saved dataset, each with where it is: file and line.

    Raises:
        InputError: nothing is there, or it is not UTF-8 or not JSON.
    """
    if path.is_dir():
        yield from _dataset_rows(path)
    elif path.is_file():
        yield from _file_rows(path)
    else:
        raise InputError(f"{path}: found no such file; expected JSONL, JSON or a dataset")


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: found bytes that are not UTF-8 at {error.start}") from error
    if text.lstrip().startswith("["):
        for index, row in enumerate(_parse(text, str(path))):
            yield f"{path}: item {index}", row
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, _parse(line, where)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: found text that is not JSON ({error.msg})") from error


def _dataset_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise InputError(f"{path}: found a directory that `datasets` did not save") from error
    if isinstance(dataset, datasets.DatasetDict):
        splits = ", ".join(dataset)
        raise InputError(f"{path}: found splits {splits}; expected one of them: {path}/SPLIT")
    for index, row in enumerate(dataset):
        yield f"{path}: row {index}", row


def _sample(row: Any, where: str) -> Sample:
    if not isinstance(row, dict):
        raise InputError(f"{where}: found {type(row).__name__}; expected an object")
    try:
        return Sample.model_validate(row)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "missing":
            raise InputError(f"{where}: {field}: found nothing; expected a string") from error
        found = repr(problem["input"])[:80]
        expected = "a string"
        if field == "type":
            hint = closest(str(problem["input"]), SAMPLE_TYPES)
            expected = f"one of {', '.join(SAMPLE_TYPES)}{hint}"
        raise InputError(f"{where}: {field}: found {found}; expected {expected}") from error


def save_samples(samples: Iterable[Sample], path: str | os.PathLike[str]) -> None:
    """Write samples to `path` by its suffix: `.jsonl`, `.json`, or none for a `datasets` directory."""
    path = Path(path)
    rows = [sample.model_dump() for sample in samples]
    if path.suffix == ".jsonl":
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    elif path.suffix == ".json":
        write_text(path, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
    elif path.suffix == "":
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    else:
        raise InputError(f"{path}: found suffix {path.suffix}; expected .jsonl, .json or none")


def limit_samples(samples: Sequence[Sample], limit: int | None, seed: int) -> list[Sample]:
    """`limit` samples of each type, drawn by `seed`, in their order; all for `None`."""
    if limit is None:
        return list(samples)
    kept: set[int] = set()
    for kind in SAMPLE_TYPES:
        indices = [index for index, sample in enumerate(samples) if sample.type == kind]
        random.Random(seed).shuffle(indices)
        kept.update(indices[:limit])
    return [samples[index] for index in sorted(kept)]


def split_samples(
    samples: Sequence[Sample], fractions: Mapping[str, float], *, seed: int = 0
) -> dict[str, list[Sample]]:
    """Samples by split name, e.g. `{"train": 0.8, "validation": 0.1, "test": 0.1}`.

    Whole prompts are dealt, so that no prompt is in two splits; each stratum (type, category) is
    dealt by itself. The same seed gives the same splits whatever the order of the samples. Within a
    split the samples keep their order.

    Raises:
        InputError: a fraction is negative or the fractions do not sum to 1.
    """
    if any(share < 0 for share in fractions.values()) or abs(sum(fractions.values()) - 1) > 1e-6:
        raise InputError(f"fractions: found {dict(fractions)}; expected shares that sum to 1")
    strata: dict[tuple[str, str], set[str]] = defaultdict(set)
    stratum_of: dict[str, tuple[str, str]] = {}
    for sample in sorted(samples, key=lambda s: (s.prompt, s.type, s.category or "")):
        stratum = stratum_of.setdefault(sample.prompt, (sample.type, sample.category or ""))
        strata[stratum].add(sample.prompt)
    split_of: dict[str, str] = {}
    for stratum in sorted(strata):
        prompts = sorted(strata[stratum])
        random.Random(f"{seed} {stratum}").shuffle(prompts)
        bounds, total = [], 0.0
        for share in fractions.values():
            total += share
            bounds.append(round(total * len(prompts)))
        start = 0
        for name, end in zip(fractions, bounds, strict=True):
            split_of.update(dict.fromkeys(prompts[start:end], name))
            start = end
    splits: dict[str, list[Sample]] = {name: [] for name in fractions}
    for sample in samples:
        splits[split_of[sample.prompt]].append(sample)
    return splits
