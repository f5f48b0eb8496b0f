"""Checks of a genome config before any model is loaded; each failure is one line."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_align.errors import InputError, closest

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks.manager import TaskDict
    from mergekit.evo.config import TaskConfiguration
    from mergekit.evo.genome import ModelGenomeDefinition

File = str | os.PathLike[str]
_SHAPE = (
    "architectures",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
)


def check_genome(content: dict[str, Any], file: File) -> None:
    """The genome's method is known, its base model is there where needed, its models fit together.

    Raises:
        InputError: names the file, the key, what was found and what was expected.
    """
    from mergekit.evo.genome import METHOD_PARAM_MAPS
    from mergekit.merge_methods import registered_methods
    from mergekit.merge_methods.base import BasePolicy

    genome = content.get("genome")
    if not isinstance(genome, dict):
        raise InputError.at(file, "genome", found=genome, expected="a mapping")
    method = genome.get("merge_method")
    if method not in METHOD_PARAM_MAPS:
        known = sorted(METHOD_PARAM_MAPS)
        raise InputError.at(
            file,
            "genome.merge_method",
            found=repr(method),
            expected=f"one of {', '.join(known)}{closest(str(method), known)}",
        )
    policies = {m.spec.name: m.spec.contract.base for m in registered_methods()}
    if genome.get("base_model") is None and policies.get(method) == BasePolicy.REQUIRED:
        raise InputError.at(
            file, "genome.base_model", found="nothing", expected=f"a model; {method} needs one"
        )
    models = genome.get("models")
    if not isinstance(models, list) or not models:
        raise InputError.at(file, "genome.models", found=models, expected="a list of models")


def check_start(start: Mapping[str, float], method: str, file: File) -> None:
    """Every parameter that has a start is one of the method's, and its start is finite.

    Raises:
        InputError: names the file, the key, what was found and what was expected.
    """
    from mergekit.evo.genome import METHOD_PARAM_MAPS

    for name, value in start.items():
        if name not in METHOD_PARAM_MAPS[method]:
            raise InputError.at(
                file,
                f"align.start.{name}",
                found="an unknown parameter",
                expected=f"one of {', '.join(METHOD_PARAM_MAPS[method])}, as {method} has them",
            )
        if not math.isfinite(value):
            raise InputError.at(
                file, f"align.start.{name}", found=value, expected="a finite number"
            )


def check_models(genome: ModelGenomeDefinition, file: File) -> None:
    """Local models have weights and are of one architecture and shape; hub names pass.

    Raises:
        InputError: names the file, the key, what was found and what was expected.
    """
    named = [
        (f"genome.models[{index}]", model.model.path) for index, model in enumerate(genome.models)
    ]
    if genome.base_model is not None:
        named.append(("genome.base_model", genome.base_model.model.path))
    check_same_shape(named, file)


def check_same_shape(named: Sequence[tuple[str, str]], file: File) -> None:
    """As `check_models`, of models by the keys that name them.

    Raises:
        InputError: names the file, the key, what was found and what was expected.
    """
    reference: tuple[str, dict[str, Any]] | None = None
    for key, name in named:
        config = local_config(name, f"{os.fspath(file)}: {key}")
        if config is None:
            continue
        if reference is None:
            reference = (name, config)
            continue
        for field in _SHAPE:
            if config.get(field) != reference[1].get(field):
                raise InputError.at(
                    file,
                    key,
                    found=f"{field} {config.get(field)} in {name}",
                    expected=f"{reference[1].get(field)}, as in {reference[0]}",
                )


def local_config(name: str, where: str) -> dict[str, Any] | None:
    """`config.json` of a complete local model; None for a name on the hub.

    Args:
        name: a directory or a hub name.
        where: what names the model, as an error begins: a file and its key, or an option.

    Raises:
        InputError: there is no such directory, or no model in it.
    """

    def error(found: str, expected: str = "a model") -> InputError:
        return InputError(f"{where}: found {found}; expected {expected}")

    directory = Path(name)
    if not directory.is_dir():
        # A hub name is `owner/name`; anything else can only have meant a path.
        if directory.is_absolute() or name.startswith(".") or name.count("/") != 1:
            raise error(f"no directory {name}")
        if directory.parent.is_dir():
            raise error(f"no directory {name}", "a model, or a hub name")
        return None
    try:
        config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as missing:
        raise error(f"no config.json in {name}") from missing
    except ValueError as malformed:
        raise error(f"a config.json that is not JSON in {name}") from malformed
    if not [*directory.glob("*.safetensors"), *directory.glob("*.bin")]:
        raise error(f"no weights in {name}")
    return config


def check_writable(directory: str, file: File, key: str) -> None:
    """`directory` can be made and written to; it is made.

    Raises:
        InputError: it cannot.
    """
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise InputError.at(
            file, key, found=f"{directory} ({error.strerror})", expected="a writable directory"
        ) from error


def find_tasks(
    names: Mapping[str, str], search_path: Sequence[str], *, metadata: dict[str, Any]
) -> dict[str, TaskDict]:
    """What lm-eval loads for each name: a task, or a group or tag with its tasks.

    Args:
        names: by where each is given, as an error begins.
        search_path: directories of tasks beside lm-eval's own.
        metadata: what tasks are told about the run.

    Raises:
        InputError: a name is unknown; gives the closest one.
    """
    from lm_eval.tasks import TaskManager

    path = list(search_path)
    manager = TaskManager(include_path=path, include_defaults=False, metadata=metadata)
    if any(name not in manager.all_tasks for name in names.values()):
        manager = TaskManager(include_path=path, metadata=metadata)
    loaded = {}
    for where, name in names.items():
        if name not in manager.all_tasks:
            expected = f"a task that lm-eval knows{closest(name, manager.all_tasks)}"
            raise InputError(f"{where}: found {name!r}; expected {expected}")
        try:
            loaded[where] = manager.load([name])
        except KeyError:  # a group of tasks that are lm-eval's own
            manager = TaskManager(include_path=path, metadata=metadata)
            loaded[where] = manager.load([name])
    return loaded


def load_tasks(
    tasks: Sequence[TaskConfiguration],
    file: File,
    search_path: Sequence[str],
    *,
    metadata: dict[str, Any],
) -> dict[str, TaskDict]:
    """What lm-eval loads for each task's name; each is known and reports what is asked of it.

    Raises:
        InputError: names the file, the key, what was found and what was expected.
    """
    if not tasks:
        raise InputError.at(file, "tasks", found="none", expected="at least one")
    for index, task in enumerate(tasks):
        if not math.isfinite(task.weight):
            raise InputError.at(
                file, f"tasks[{index}].weight", found=task.weight, expected="a finite number"
            )
    names: dict[str, str] = {}
    for index, task in enumerate(tasks):
        if task.name not in names.values():
            names[f"{os.fspath(file)}: tasks[{index}].name"] = task.name
    loaded = find_tasks(names, search_path, metadata=metadata)
    found = {name: loaded[where] for where, name in names.items()}
    for index, task in enumerate(tasks):
        metrics = task_metrics(task.name, found[task.name])
        if not metrics:
            raise InputError.at(
                file,
                f"tasks[{index}].name",
                found=f"{task.name}, of which lm-eval reports no metric of its own",
                expected="a task, or a group with `aggregate_metric_list`",
            )
        if task.metric not in metrics:
            raise InputError.at(
                file,
                f"tasks[{index}].metric",
                found=repr(task.metric),
                expected=f"one of {', '.join(sorted(metrics))}{closest(task.metric, metrics)}",
            )
    return found


def scores_alignment(task: Task) -> bool:
    """Whether an lm-eval task says, by its sample type or a tag, that it is about alignment."""
    tags = task.config.tag or []
    tags = [tags] if isinstance(tags, str) else tags
    return getattr(task, "sample_type", None) == "alignment" or "alignment" in tags


def task_metrics(name: str, loaded: Any) -> set[str]:
    """`metric,filter` names that lm-eval reports of a task, or of a group; of a tag none."""
    filters = {ensemble.name for task in loaded["tasks"].values() for ensemble in task._filters}
    if name in loaded["tasks"]:
        return {
            f"{metric},{each}" for metric in loaded["tasks"][name].aggregation() for each in filters
        }
    group = (loaded.get("groups") or {}).get(name)
    aggregated = (group.aggregate_metric_list or []) if group else []
    return {f"{own.metric},{each}" for own in aggregated for each in own.filter_list or filters}
