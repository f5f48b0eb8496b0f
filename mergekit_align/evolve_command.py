"""The stock `mergekit-evolve` command, with what it requires read from the config's `align:` section.

`mergekit-evolve examples/genomic.yml` runs with no other option; an explicit option always wins. The
config is checked before any model is loaded: what is wrong is one line and exit status 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mergekit_align import upstream_fixes
from mergekit_align.align_section import AlignSection
from mergekit_align.checks import check_writable, scores_alignment
from mergekit_align.cli.common import InputErrorMessage
from mergekit_align.devices import default_device, use_cpu_only
from mergekit_align.errors import InputError
from mergekit_align.genome_config import GenomeFile, read_genome, task_metadata
from mergekit_align.genome_methods import fix_genomes, start_genomes_at

# `align:` key -> parameter of the stock command, where the two names differ
_RENAMED = {"workers": "num_gpus"}
_OPTIONS = (
    "storage_path",
    "max_fevals",
    "batch_size",
    "random_seed",
    "workers",
    "in_memory",
    "strategy",
    "sigma0",
    "force_population_size",
    "timeout",
    "save_final_model",
)


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
            genome_file = prepare(options, explicit)
        except InputError as error:
            raise InputErrorMessage(str(error)) from error
        section = genome_file.section
        _give_tasks_their_data(section)
        start_genomes_at(section.start or {})
        fix_genomes(genome_file.fixed)
        upstream_fixes.keep_the_search_repeatable(options["random_seed"], options["storage_path"])
        return stock(**options)

    command.callback = callback


def prepare(options: dict[str, Any], explicit: Iterable[str]) -> GenomeFile:
    """Fill `options` of the stock command from its config's `align:` section, and check the config.

    Args:
        options: the stock command's parameters; changed in place.
        explicit: names of those that the command line gave.

    Raises:
        InputError: the config, its models, tasks or data cannot be used.
    """
    explicit = set(explicit)
    file = options["genome_config_path"]
    genome_file = read_genome(
        file,
        task_search_path=options["task_search_path"],
        allow_crimes=options["allow_crimes"],
    )
    section = genome_file.section
    for key, value in section.model_dump(include=set(_OPTIONS), exclude_none=True).items():
        name = _RENAMED.get(key, key)
        if name not in explicit:
            options[name] = value
    if options["storage_path"] is None:
        options["storage_path"] = f"{Path(file).stem}-evolved"
    options["task_search_path"] = genome_file.task_search_path
    check_writable(options["storage_path"], file, "align.storage_path")
    if not any(scores_alignment(task) for task in genome_file.tasks):
        click.echo(f"{file}: tasks: none of them scores alignment", err=True)
    _choose_device(section.device, options, explicit, file)
    return genome_file


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
