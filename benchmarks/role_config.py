"""Configs of an aligned model's and an expert's merge, by any method: what it needs is filled in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mergekit.merge_methods import get

WITHOUT_BASE = ("linear", "fisher", "regmean", "regmean_plus")


def parameters_of(method: str) -> set[str]:
    return {parameter.name for parameter in get(method).spec.parameters}


def role_config(
    method: str,
    directory: Path,
    parents: Iterable[str],
    parameters: Mapping[str, Any],
    *,
    base: str,
    dtype: str,
) -> dict[str, Any]:
    """The parents were both made from the base; SafeMERGE's safe model is the aligned one.

    Args:
        directory: holds the parents, and what `mergekit-align-stats` found of them, and of the base on
            their samples, as `statistics/PARENT` and `statistics/base-PARENT`.
        parents: the name of the aligned model, which is `aligned`, and the expert's.
        parameters: a value, or one for each model as a mapping.
    """
    models = {name: "aligned" if name == "aligned" else "expert" for name in parents}
    if method == "safemerge":
        safe = directory / "safe"
        if not safe.exists():
            safe.symlink_to("aligned")  # no other model was fine-tuned on safety data
        models["safe"] = "safe"
    needed: dict[str, Any] = {
        "role": models,
        "statistics": {name: f"{directory}/statistics/{name}" for name in models},
        "base_statistics": {name: f"{directory}/statistics/base-{name}" for name in models},
        "origin": "base",
    }
    known = parameters_of(method)
    given = {**{key: value for key, value in needed.items() if key in known}, **parameters}
    content: dict[str, Any] = {
        "merge_method": method,
        "models": [
            {
                "model": f"{directory}/{name}",
                "parameters": {
                    key: value[name]
                    for key, value in given.items()
                    if isinstance(value, Mapping) and name in value
                },
            }
            for name in models
        ],
        "parameters": {k: v for k, v in given.items() if not isinstance(v, Mapping)},
        "dtype": dtype,
    }
    if method not in WITHOUT_BASE:
        content["base_model"] = base
    return content
