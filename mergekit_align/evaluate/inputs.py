"""What an evaluation is given, checked before any model is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mergekit_align.checks import File, local_config
from mergekit_align.errors import InputError
from mergekit_align.guard import GuardSettings
from mergekit_align.samples import Sample, limit_samples, load_samples
from mergekit_align.yaml_files import input_error


def named_models(models: Sequence[File], names: Sequence[str] | None) -> dict[str, str]:
    """Models by name: without any, by the shortest end of the path that no other has.

    Raises:
        InputError: there is no model, one comes twice, or the names do not fit.
    """
    paths = [os.fspath(model) for model in models]
    if not paths:
        raise InputError("models: found none; expected at least one")
    places = [os.path.realpath(path) if os.path.isdir(path) else path for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise InputError(f"models: found {path} twice; expected every model once")
    if names is None:
        parts = [Path(path).parts for path in paths]
        names = []
        for own in parts:
            ends = range(1, len(own) + 1)
            alone = (n for n in ends if [p[-n:] for p in parts].count(own[-n:]) == 1)
            names.append("/".join(own[-next(alone, len(own)) :]))
    if len(set(names)) < len(names) or len(names) != len(paths):
        raise InputError(
            f"--name: found {', '.join(names)}; expected a name of its own for each of "
            f"{len(paths)} models"
        )
    return dict(zip(names, paths, strict=True))


def chosen_samples(data: Sequence[File | Sample], limit: int | None, seed: int) -> list[Sample]:
    """The samples of all files, or `limit` of each type, drawn by `seed`, in their order.

    Raises:
        InputError: a file cannot be read, or none of the samples tells how aligned a model is.
    """
    samples: list[Sample] = []
    for item in data:
        samples += [item] if isinstance(item, Sample) else load_samples(item)
    if data and not any(sample.type in ("alignment", "benign") for sample in samples):
        files = ", ".join(os.fspath(item) for item in data if not isinstance(item, Sample))
        raise InputError(
            f"{files or 'data'}: found no sample of type alignment or benign; expected some"
        )
    return limit_samples(samples, limit, seed)


def guard_settings(
    guard: File | None,
    profile: str | None,
    threshold: float,
    device: str | None,
    samples: Sequence[Sample],
) -> GuardSettings | None:
    """The guard that judges, and how; `None` for no guard.

    Raises:
        InputError: there is nothing to judge, no such guard, or a setting is out of its range.
    """
    from pydantic import ValidationError

    if guard is None:
        if profile is not None:
            raise InputError("--guard-profile: found one without --guard; expected both")
        return None
    if not any(sample.type == "alignment" for sample in samples):
        raise InputError("--guard: found no alignment sample to judge; expected some in --data")
    local_config(os.fspath(guard), "--guard")
    try:
        return GuardSettings(
            model=os.fspath(guard), profile=profile, threshold=threshold, device=device
        )
    except ValidationError as error:
        raise input_error(error, "--guard", prefix="") from error
