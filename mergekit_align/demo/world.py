"""Build a demo world: data, four models and a guard, trained here and now on the CPU; a writer too,
where one is asked for.

A build records each finished model in `building.json`, and that file's last act is to become
`world.json`: its existence means that the rest is complete. An interrupted build therefore resumes
at the first model that was not finished, with the same result as one that was never interrupted,
since every model starts from files and has its own random numbers.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mergekit_align
from mergekit_align.demo.corpus import MODELS, SPLITS, Corpus, ModelName
from mergekit_align.demo.models import ARCHITECTURES, Architecture
from mergekit_align.demo.recipes import SCALES, Scale, build_model
from mergekit_align.errors import InputError
from mergekit_align.files import write_text
from mergekit_align.samples import save_samples

_WRITER_SEED = 1000  # its own, beyond those of the other models


def build_world(
    directory: str | os.PathLike[str],
    *,
    seed: int = 0,
    architecture: Architecture = "llama",
    scale: Scale = "full",
    third: bool = True,
    writer: bool = False,
) -> None:
    """Build, finish or keep the world in `directory`.

    It then holds `data/{train,validation,test}.jsonl`, one directory a model (`base`, `aligned`,
    `expert-a`, `expert-b`, `guard`), and `world.json`: the settings, and each model's training time
    in seconds and final loss in nats/token.

    Args:
        directory: new, empty, or holding a world (finished or not) of the same settings.
        seed: deals the prompts to the splits and draws the models' weights and batches.
        architecture: of all the models.
        scale: `full` trains for ten to twenty minutes; `smoke` writes the same files in seconds, and
            its models know next to nothing.
        third: train `expert-b`, which merges of two models can do without.
        writer: also train `writer`, which asks questions.

    Into a finished world a model that it lacks is trained alone.

    Raises:
        InputError: a setting is unknown, or `directory` holds something else.
    """
    if architecture not in ARCHITECTURES:
        raise _unknown("architecture", architecture, ARCHITECTURES)
    if scale not in SCALES:
        raise _unknown("scale", scale, SCALES)
    directory = Path(directory)
    settings = {
        "seed": seed,
        "architecture": architecture,
        "scale": scale,
        "version": mergekit_align.__version__,
    }
    wanted: list[ModelName] = [name for name in MODELS if third or name != "expert-b"]
    if writer:
        wanted.append("writer")
    if _is_finished(directory, settings):
        _train(directory, directory / "world.json", wanted)
        return
    directory.mkdir(parents=True, exist_ok=True)
    record_file = directory / "building.json"
    if not record_file.exists():
        _write(record_file, {**settings, "models": {}})
    corpus = Corpus(seed)
    for split in SPLITS:
        save_samples(corpus.samples(split), directory / "data" / f"{split}.jsonl")
    _train(directory, record_file, wanted)
    # Written last, so that its existence means the rest is complete.
    os.replace(record_file, directory / "world.json")


def _train(directory: Path, record_file: Path, wanted: Sequence[ModelName]) -> None:
    """Train the models of `wanted` that a record does not have yet."""
    record = json.loads(record_file.read_text(encoding="utf-8"))
    seed: int = record["seed"]
    corpus = Corpus(seed)
    for name in wanted:
        if name not in record["models"]:
            own = (
                _WRITER_SEED + seed if name == "writer" else seed * len(MODELS) + MODELS.index(name)
            )
            record["models"][name] = build_model(
                directory, name, corpus, record["architecture"], record["scale"], seed=own
            )
            _write(record_file, record)


def _is_finished(directory: Path, settings: dict[str, Any]) -> bool:
    """Whether the world is there already; other settings or other files are the user's mistake."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: found a file; expected a directory for the demo world")
    for name in ("world.json", "building.json"):
        file = directory / name
        if not file.exists():
            continue
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            there = {key: found[key] for key in settings}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file}: found no record of a demo world; delete it") from error
        if there != settings:
            raise InputError(
                f"{directory}: found a demo world of {_described(there)}; "
                f"expected {_described(settings)} or another directory"
            )
        return name == "world.json"
    if directory.exists() and any(directory.iterdir()):
        raise InputError(f"{directory}: found other files; expected a new or an empty directory")
    return False


def _write(file: Path, record: dict[str, Any]) -> None:
    write_text(file, json.dumps(record, indent=2) + "\n")


def _unknown(option: str, found: str, known: Sequence[str]) -> InputError:
    return InputError(f"{option}: found {found!r}; expected one of {', '.join(known)}")


def _described(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())
