"""The config of a search: the genome's file with what `mergekit-align-evolve` reads of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_align.align_section import Distillation
from mergekit_align.checks import check_writable, task_metrics
from mergekit_align.devices import check_device, default_device, default_dtype
from mergekit_align.errors import InputError, closest
from mergekit_align.evolve.ascent import check_differentiable
from mergekit_align.evolve.distillation import check_teachers
from mergekit_align.evolve.genes import Genes
from mergekit_align.evolve.racing import check_racing
from mergekit_align.evolve.searchers import BY_GRADIENT, MULTI_OBJECTIVE, SEARCHERS
from mergekit_align.fingerprint import lora_cache, model_fingerprint
from mergekit_align.genome_config import GenomeFile, read_genome

DEFAULT_EVALUATIONS = 100


class Floor(NamedTuple):
    """A constraint: the least value that a metric may have."""

    name: str
    """`TASK:METRIC`, as the config has it."""
    task: str
    metric: str
    least: float


class EvolveConfig(NamedTuple):
    """A search, ready to run."""

    file: GenomeFile
    genes: Genes
    searcher: str
    floors: list[Floor]
    objectives: list[tuple[str, str]]
    """Task and metric of each; empty where the fitness is the one."""
    evaluations: int
    seconds: float | None
    device: str
    dtype: torch.dtype
    seed: int
    storage: Path
    """The directory of everything that the search writes."""
    study: str
    """A journal file, or a URL of Optuna's."""
    given: dict[str, Any]
    """What `read_config` was given beside the file."""

    @property
    def racing(self) -> bool:
        """Whether candidates that are losing are stopped early."""
        return self.file.section.racing

    @property
    def distillation(self) -> Distillation | None:
        """What keeps the merged model near its parents."""
        return self.file.section.distillation

    @property
    def by_gradient(self) -> bool:
        """Whether the searcher needs gradients."""
        return self.searcher in BY_GRADIENT

    @property
    def path(self) -> str:
        return self.file.path

    @property
    def models(self) -> list[ModelReference]:
        """All that are merged, the base last."""
        genome = self.file.config.genome
        return [*genome.models, *([genome.base_model] if genome.base_model else [])]

    def merge_options(self) -> MergeOptions:
        """mergekit's, as the stock search has them."""
        return MergeOptions(
            lora_merge_cache=lora_cache(self.storage / "lora_merge_cache", self.models),
            device=self.device,
            random_seed=self.seed,
            quiet=True,
        )

    def identity(self) -> dict[str, Any]:
        """What makes a study of this config another one than a study of another config."""
        section = self.file.section
        objectives = [":".join(each) for each in self.objectives] or ["fitness"]
        places = [*(section.statistics or {}).values(), *(section.base_statistics or {}).values()]
        statistics = {place: model_fingerprint(place) for place in places}
        return {
            "searcher": self.searcher,
            "objectives": objectives,
            "floors": {floor.name: floor.least for floor in self.floors},
            "genes": [list(gene) for gene in self.genes.every],
            **self.file.config.model_dump(mode="json"),
            "align": section.model_dump(
                mode="json",
                include={
                    "openings",
                    "guard",
                    "roles",
                    "sigma0",
                    "force_population_size",
                    "warm_start",
                    "grid_points",
                },
            ),
            **({"racing": True} if self.racing else {}),
            **({"distillation": self.distillation.model_dump()} if self.distillation else {}),
            "random_seed": self.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
            "models": {str(model): _fingerprint(model) for model in self.models},
            **({"statistics": statistics} if statistics else {}),
            "data": None if section.data is None else _digest(section.data),
        }


def read_config(
    path: str | os.PathLike[str],
    *,
    storage: str | os.PathLike[str] | None = None,
    evaluations: int | None = None,
    seconds: float | None = None,
    searcher: str | None = None,
    device: str | None = None,
    seed: int | None = None,
    task_search_path: Sequence[str] = (),
) -> EvolveConfig:
    """The config in a file; what is given here wins.

    Raises:
        InputError: it cannot be used; before any model is loaded.
    """
    from mergekit.evo.config import check_for_naughty_config

    file = read_genome(path, task_search_path=task_search_path)
    section = file.section
    if seed is not None:
        section = section.model_copy(update={"random_seed": seed})
        file = file._replace(section=section)
    name = searcher or section.searcher or ("nsga2" if section.objectives else "cma")
    if name not in SEARCHERS:
        raise InputError.at(
            file.path,
            "align.searcher",
            found=repr(name),
            expected=f"one of {', '.join(SEARCHERS)}{closest(name, SEARCHERS)}",
        )
    floors = [
        Floor(key, *_metric(key, file, f"align.floors.{key}"), least)
        for key, least in section.floors.items()
    ]
    objectives = [
        _metric(key, file, f"align.objectives[{index}]")
        for index, key in enumerate(section.objectives)
    ]
    if len(objectives) > 1 and name not in MULTI_OBJECTIVE:
        raise InputError.at(
            file.path,
            "align.objectives",
            found=f"{len(objectives)} with the searcher {name}",
            expected=f"one, or the searcher {', '.join(MULTI_OBJECTIVE)}",
        )
    where = device or section.device or default_device()
    check_device(where, f"{file.path}: align.device")
    directory = Path(storage or section.storage_path or f"{Path(file.path).stem}-evolved")
    check_writable(str(directory), file.path, "align.storage_path")
    budget = section.budget
    config = EvolveConfig(
        file,
        Genes(file),
        name,
        floors,
        objectives,
        evaluations or budget.evaluations or section.max_fevals or DEFAULT_EVALUATIONS,
        seconds or budget.seconds or section.timeout,
        where,
        default_dtype(where),
        section.random_seed or 0,
        directory,
        section.study or str(directory / "study.journal"),
        {
            "storage": storage,
            "evaluations": evaluations,
            "seconds": seconds,
            "searcher": searcher,
            "device": device,
            "seed": seed,
            "task_search_path": task_search_path,
        },
    )
    check_for_naughty_config(file.config, allow=True)  # which warns of benchmarks among the tasks
    if config.by_gradient:
        check_differentiable(config)
    check_teachers(config)
    if config.racing:
        check_racing(config)
    return config


def _metric(key: str, file: GenomeFile, where: str) -> tuple[str, str]:
    """Task and metric that `TASK:METRIC` names, the metric as lm-eval does.

    Raises:
        InputError: no task of the config gives it.
    """
    task, _, metric = key.partition(":")
    own = [each.metric for each in file.config.tasks if each.name == task]
    if not own:
        names = list(file.loaded)
        raise InputError(
            f"{file.path}: {where}: found no task {task!r} among `tasks`; expected one of "
            f"{', '.join(names)}{closest(task, names)}"
        )
    if not metric:
        return task, own[0]
    known = sorted({*task_metrics(task, file.loaded[task]), *own})
    full = metric if "," in metric else f"{metric},none"
    if full not in known:
        plain = [each.removesuffix(",none") for each in known]
        raise InputError(
            f"{file.path}: {where}: found metric {metric!r}, which {task} does not give; expected "
            f"one of {', '.join(plain)}{closest(metric, plain)}"
        )
    return task, full


def _fingerprint(model: ModelReference) -> str:
    parts = [each.path for each in (model.model, model.lora) if each is not None]
    return "+".join(map(model_fingerprint, parts))


def _digest(path: str) -> str:
    import hashlib

    if Path(path).is_dir():
        return model_fingerprint(path)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
