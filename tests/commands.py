"""Commands by name, ours and stock ones, as click has them; a folder in which documented ones run."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from lm_eval.tasks import TaskManager
from mergekit.evo.config import EvolMergeConfiguration

from mergekit_align.align_section import AlignSection, parse_align_section
from mergekit_align.checks import check_genome
from mergekit_align.eval_task_files import eval_tasks_path
from mergekit_align.samples import limit_samples, load_samples, save_samples
from mergekit_align.tasks import GuardTask, RefusalTask, response

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    script.name: script
    for script in importlib.metadata.entry_points(group="console_scripts")
    if script.name.startswith("mergekit-")
}
METRICS = {*response.METRICS, *GuardTask.HIGHER_IS_BETTER, *RefusalTask.HIGHER_IS_BETTER}
OURS = sorted(name for name in SCRIPTS if name.startswith("mergekit-align-"))


def command(name: str) -> click.Command:
    main = SCRIPTS[name].load()
    assert isinstance(main, click.Command)
    return main


def lay_out(directory: Path, world: Path, *, samples: int | None = None) -> None:
    """The examples, and `world` under the name that the documents give it.

    Args:
        samples: of each type and file at most.
    """
    shutil.copytree(ROOT / "examples", directory / "examples", dirs_exist_ok=True)
    (directory / "demo-world").mkdir()
    for place in world.iterdir():
        if place.name != "data" or samples is None:
            (directory / "demo-world" / place.name).symlink_to(place)
            continue
        for file in place.iterdir():
            few = limit_samples(load_samples(file), samples, seed=0)
            save_samples(few, directory / "demo-world" / "data" / file.name)


def check_genome_file(
    content: dict[str, Any], file: Path, *, task_paths: Sequence[Path] = ()
) -> AlignSection:
    """That a genome config fits the schemas, and names tasks and metrics that there are.

    Args:
        task_paths: where its `task_search_path` is found here; by default from the repository's root.
    """
    section = parse_align_section(content, file)
    check_genome(content, file)
    config = EvolMergeConfiguration.model_validate(content)
    own = task_paths or [ROOT / path for path in section.task_search_path]
    paths = [str(eval_tasks_path()), *map(str, own)]
    manager = TaskManager(include_path=paths, include_defaults=False)
    assert {task.name for task in config.tasks} <= set(manager.all_tasks)
    assert {task.metric.removesuffix(",none") for task in config.tasks} <= METRICS
    return section
