"""A genome config file, as `mergekit-evolve` and `mergekit-align-evolve` both read it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_align.align_section import AlignSection, parse_align_section
from mergekit_align.checks import check_genome, check_models, check_start, load_tasks
from mergekit_align.errors import InputError, closest
from mergekit_align.eval_task_files import eval_tasks_path
from mergekit_align.merge_methods.roles import MergeConfigError, check_role_names
from mergekit_align.merge_methods.statistics import check_statistics_of
from mergekit_align.yaml_files import input_error, read_yaml_mapping

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks.manager import TaskDict
    from mergekit.evo.config import EvolMergeConfiguration
    from mergekit.evo.genome import ModelGenomeDefinition


FIXED = {"roles": "role", "statistics": "statistics", "base_statistics": "base_statistics"}
"""Keys of the section that give each model a parameter."""


class GenomeFile(NamedTuple):
    """A genome config, read and checked."""

    path: str
    section: AlignSection
    """Its `align:` section."""
    config: EvolMergeConfiguration
    loaded: dict[str, TaskDict]
    """What lm-eval loads for each task's name: a task, or a group with its tasks."""
    task_search_path: list[str]
    """Directories of lm-eval tasks: ours, the section's, the caller's."""
    fixed: list[dict[str, str]]
    """Parameters that each of the genome's models has, whatever the genotype."""

    @property
    def tasks(self) -> list[Task]:
        """Every task that the fitness reads, those of groups too."""
        return [task for loaded in self.loaded.values() for task in loaded["tasks"].values()]


def read_genome(
    path: str | os.PathLike[str],
    *,
    task_search_path: Sequence[str] = (),
    allow_crimes: bool = False,
) -> GenomeFile:
    """The genome config in a file.

    Args:
        task_search_path: directories of lm-eval tasks, beside ours and the section's.
        allow_crimes: as mergekit's option: the models may differ in architecture.

    Raises:
        InputError: the config, its models, tasks or data cannot be used; before any model is loaded.
    """
    from mergekit.evo.config import EvolMergeConfiguration
    from pydantic import ValidationError

    path = os.fspath(path)
    content = read_yaml_mapping(path)
    section = parse_align_section(content, path)
    check_genome(content, path)
    try:
        config = EvolMergeConfiguration.model_validate(content)
    except ValidationError as error:
        raise input_error(error, path, prefix="") from error
    fixed = _fixed_parameters(section, config.genome, path)
    check_start(section.start or {}, config.genome.merge_method, path)
    if not allow_crimes:
        check_models(config.genome, path)
    search_path = [str(eval_tasks_path()), *section.task_search_path, *task_search_path]
    loaded = load_tasks(config.tasks, path, search_path, metadata=task_metadata(section))
    return GenomeFile(path, section, config, loaded, search_path, fixed)


def _fixed_parameters(
    section: AlignSection, genome: ModelGenomeDefinition, file: str
) -> list[dict[str, str]]:
    """What the section says of each of the genome's models: its role, its statistics.

    Raises:
        InputError: a model lacks what the method asks for, or something is said of no model.
    """
    models = [str(model) for model in genome.models]
    given = {key: dict(getattr(section, key) or {}) for key in FIXED}
    for key, own in given.items():
        for name in own:
            if name not in models:
                expected = f"one of the genome's models{closest(name, models)}"
                where = f"align.{key}.{name}"
                raise InputError.at(file, where, found="no model", expected=expected)
    try:
        check_role_names(genome.merge_method, [(name, given["roles"].get(name)) for name in models])
    except MergeConfigError as error:
        raise InputError(f"{file}: align.roles: {error}") from error
    fixed = [
        {parameter: given[key][name] for key, parameter in FIXED.items() if name in given[key]}
        for name in models
    ]
    try:
        check_statistics_of(
            genome.merge_method, list(zip(genome.models, fixed, strict=True)), genome.base_model
        )
    except MergeConfigError as error:
        raise InputError(f"{file}: align: {error}") from error
    return fixed


def task_metadata(section: AlignSection) -> dict[str, Any]:
    """What lm-eval passes on to every task: where our response tasks find their samples."""
    metadata: dict[str, Any] = {}
    if section.data is not None:
        metadata["data"] = str(Path(section.data).resolve())
    if section.openings is not None:
        metadata["openings"] = section.openings.model_dump()
    if section.guard is not None:
        metadata["guard"] = section.guard.model_dump()
    return metadata
