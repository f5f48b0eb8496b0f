"""The stock `mergekit-evolve` command, with what it requires read from the config's `align:` section.

`mergekit-evolve examples/genomic.yml` runs with no other option; an explicit option always wins. The
config is checked before any model is loaded: what is wrong is one line and exit status 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mergekit_align import upstream_fixes
from mergekit_align.align_section import AlignSection, parse_align_section
from mergekit_align.checks import (
    check_genome,
    check_models,
    check_start,
    check_writable,
    load_tasks,
    scores_alignment,
)
from mergekit_align.cli.common import InputErrorMessage
from mergekit_align.devices import default_device, use_cpu_only
from mergekit_align.errors import InputError, closest
from mergekit_align.eval_task_files import eval_tasks_path
from mergekit_align.genome_methods import give_genomes_roles, start_genomes_at
from mergekit_align.merge_methods.roles import MergeConfigError, check_role_names
from mergekit_align.yaml_files import input_error, read_yaml_mapping

if TYPE_CHECKING:
    from mergekit.evo.genome import ModelGenomeDefinition

# `align:` key -> parameter of the stock command, where the two names differ
_RENAMED = {"workers": "num_gpus"}
_NOT_OPTIONS = {"data", "openings", "guard", "task_search_path", "device", "start", "roles"}


def extend_command() -> None:
    """Give `mergekit.scripts.evolve.main` its defaults from the config; idempotent."""
    from mergekit.scripts import evolve

    command = evolve.main
    if getattr(command, "reads_align_section", False):
        return
    command.reads_align_section = True
    stock = command.callback
    for parameter in command.params:
        if parameter.name == "storage_path":
            parameter.required = False

    def callback(**options: Any) -> Any:
        context = click.get_current_context()
        explicit = {
            name
            for name in options
            if context.get_parameter_source(name) not in (None, ParameterSource.DEFAULT)
        }
        try:
            section = prepare(options, explicit)
        except InputError as error:
            raise InputErrorMessage(str(error)) from error
        _give_tasks_their_data(section)
        start_genomes_at(section.start or {})
        if section.roles is not None:
            give_genomes_roles(list(section.roles.values()))
        upstream_fixes.keep_the_search_repeatable(options["random_seed"], options["storage_path"])
        return stock(**options)

    command.callback = callback


def prepare(options: dict[str, Any], explicit: Iterable[str]) -> AlignSection:
    """Fill `options` of the stock command from its config's `align:` section, and check the config.

    Args:
        options: the stock command's parameters; changed in place.
        explicit: names of those that the command line gave.

    Raises:
        InputError: the config, its models, tasks or data cannot be used.
    """
    from mergekit.evo.config import EvolMergeConfiguration
    from pydantic import ValidationError

    explicit = set(explicit)
    file = options["genome_config_path"]
    content = read_yaml_mapping(file)
    section = parse_align_section(content, file)
    for key, value in section.model_dump(exclude=_NOT_OPTIONS, exclude_none=True).items():
        name = _RENAMED.get(key, key)
        if name not in explicit:
            options[name] = value
    if options["storage_path"] is None:
        options["storage_path"] = f"{Path(file).stem}-evolved"
    options["task_search_path"] = [
        str(eval_tasks_path()),
        *section.task_search_path,
        *options["task_search_path"],
    ]
    check_genome(content, file)
    try:
        config = EvolMergeConfiguration.model_validate(content)
    except ValidationError as error:
        raise input_error(error, file, prefix="") from error
    section = _with_roles(section, config.genome, file)
    check_start(section.start or {}, config.genome.merge_method, file)
    if not options["allow_crimes"]:
        check_models(config.genome, file)
    tasks = load_tasks(
        config.tasks, file, options["task_search_path"], metadata=task_metadata(section)
    )
    check_writable(options["storage_path"], file, "align.storage_path")
    if not any(scores_alignment(task) for task in tasks):
        click.echo(f"{file}: tasks: none of them scores alignment", err=True)
    _choose_device(section.device, options, explicit, file)
    return section


def _with_roles(section: AlignSection, genome: ModelGenomeDefinition, file: str) -> AlignSection:
    """The section with its roles in the order of the genome's models.

    Raises:
        InputError: a model has no role where the method asks for it, or a role is no model's.
    """
    given = section.roles or {}
    models = [str(model) for model in genome.models]
    for name in given:
        if name not in models:
            expected = f"one of the genome's models{closest(name, models)}"
            raise InputError.at(file, f"align.roles.{name}", found="no model", expected=expected)
    try:
        check_role_names(genome.merge_method, [(name, given.get(name)) for name in models])
    except MergeConfigError as error:
        raise InputError(f"{file}: align.roles: {error}") from error
    if not given:
        return section
    return section.model_copy(update={"roles": {name: given[name] for name in models}})


def _choose_device(
    device: str | None, options: dict[str, Any], explicit: set[str], file: str
) -> None:
    gpu = default_device() != "cpu"
    if device == "cuda" and not gpu:
        raise InputError.at(file, "align.device", found="cuda, but no GPU", expected="cpu")
    if options["merge_cuda"] and "merge_cuda" in explicit and not gpu:
        raise InputError("--merge-cuda: found no CUDA device; expected one")
    if device == "cpu" and gpu:
        use_cpu_only()
        upstream_fixes.use_no_gpu_where_there_is_none()
    if default_device() == "cpu":
        options["merge_cuda"] = False
        options["num_gpus"] = options["num_gpus"] or _cpu_workers()


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


def _give_tasks_their_data(section: AlignSection) -> None:
    from lm_eval.tasks import TaskManager
    from mergekit.evo import strategy

    metadata = task_metadata(section)
    base = strategy.EvaluationStrategyBase
    original = base.__init__

    def initialize(self: Any, *args: Any, task_search_path: Sequence[str], **kwargs: Any) -> None:
        original(self, *args, task_search_path=task_search_path, **kwargs)
        if metadata:
            self.task_manager = TaskManager(include_path=list(task_search_path), metadata=metadata)

    base.__init__ = initialize


def _cpu_workers() -> int:
    import ray

    if not ray.is_initialized():
        ray.init()
    return max(1, int(ray.cluster_resources().get("CPU", 1)))
