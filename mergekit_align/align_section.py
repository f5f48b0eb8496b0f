"""The `align:` section of a mergekit-evolve config.

mergekit ignores keys that it does not know, so that the same YAML is read by the stock command with
and without this package. Inside the section an unknown key is an error. Paths are relative to the
working directory, like the models' paths in the same file.
"""

from __future__ import annotations

import os
from typing import Annotated, Any

import mergekit.merge_methods  # noqa: F401 (first: as it loads it asks for ours, where `Role` is)
from pydantic import BaseModel, ConfigDict, Field

from mergekit_align.errors import InputError
from mergekit_align.guard.settings import GuardSettings
from mergekit_align.merge_methods.roles import Role
from mergekit_align.yaml_files import check_section

Finite = Annotated[float, Field(allow_inf_nan=False)]


class OpeningTexts(BaseModel):
    """Texts whose first tokens tell a refusal from help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    refusal: tuple[str, ...] = Field(min_length=1)
    help: tuple[str, ...] = Field(min_length=1)


class Budget(BaseModel):
    """When `mergekit-align-evolve` stops."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    evaluations: int | None = Field(default=None, ge=1)
    """Number of evaluations, those of an earlier run of the same study included."""
    seconds: float | None = Field(default=None, gt=0)
    """Seconds of a run; the candidate that is being evaluated then is the last."""


class Distillation(BaseModel):
    """What the merged model should go on predicting as its parents do, for searchers by gradient."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    weight: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """What a nat of divergence from a teacher costs in the fitness."""
    teachers: dict[str, str] = Field(min_length=1)
    """Of tasks, the genome's model whose predictions count on the task's samples: `{TASK: MODEL}`."""


class AlignSection(BaseModel):
    """What a config can say beyond its genome and tasks.

    The stock `mergekit-evolve` ignores what only `mergekit-align-evolve` reads: from `searcher` on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    data: str | None = None
    """Samples that our response tasks read where their own YAML names none."""
    openings: OpeningTexts | None = None
    """Refusing and helping openings for `decision_margin`; by default the data's own."""
    guard: GuardSettings | None = None
    """The guard model of tasks that judge responses, where their own YAML names none."""
    task_search_path: tuple[str, ...] = ()
    """Directories of lm-eval tasks, beside ours and the command line's."""
    storage_path: str | None = None
    """Where the search keeps its files; by default `NAME-evolved` for `NAME.yml`."""
    max_fevals: int | None = Field(default=None, ge=1)
    """Number of evaluations."""
    batch_size: int | None = Field(default=None, ge=1)
    """Evaluation batch size; by default as many samples as a token budget allows."""
    random_seed: int | None = Field(default=None, ge=0)
    """Seed of the search and of randomised merge methods."""
    device: str | None = Field(default=None, pattern="^(cpu|cuda)$")
    """Where to merge and evaluate: `cpu` or `cuda`; by default a GPU where there is one."""
    workers: int | None = Field(default=None, ge=1)
    """Candidates evaluated at the same time; by default one a GPU, or a CPU
    (`mergekit-align-evolve`: one)."""
    in_memory: bool | None = None
    """Merge in memory, without writing candidates to disk."""
    start: dict[str, float] | None = None
    """Where the search starts, by genome parameter; what is not named starts as in stock."""
    roles: dict[str, Role] | None = None
    """Which part each model plays, by its name in the genome, for a method that asks for it."""
    statistics: dict[str, str] | None = None
    """Each model's statistics, for a method that reads them."""
    base_statistics: dict[str, str] | None = None
    """The base's on each model's samples, for a method that reads them (`led`)."""
    strategy: str | None = Field(default=None, pattern="^(pool|buffered|serial)$")
    """Stock scheduling strategy."""
    sigma0: float | None = Field(default=None, gt=0)
    """Initial step size of the search."""
    force_population_size: int | None = Field(default=None, ge=2)
    """Candidates a generation."""
    timeout: float | None = Field(default=None, gt=0)
    """Seconds after which the search stops."""
    save_final_model: bool | None = None
    """Whether to write the best merge as a model."""
    searcher: str | None = None
    """What proposes candidates; by default `cma`, or `nsga2` where there are `objectives`."""
    budget: Budget = Budget()
    """When to stop; by default as `max_fevals` and `timeout` say."""
    bounds: dict[str, tuple[Finite, Finite]] = {}
    """Range of each genome parameter: `{weight: [0, 1.5]}`."""
    floors: dict[str, Finite] = {}
    """Least value of a metric that a candidate may have: `{TASK:METRIC: 0.95}`."""
    objectives: tuple[str, ...] = ()
    """Metrics, each `TASK:METRIC`, for a search of their Pareto front in place of one fitness."""
    study: str | None = None
    """Where evaluations are remembered: a journal file, or a URL of Optuna's; by default
    `study.journal` in `storage_path`."""
    warm_start: str | None = None
    """Where the search starts: a mergekit config with weights, or another search's journal."""
    grid_points: int = Field(default=5, ge=2)
    """Values of each gene for the searcher `grid`."""
    distillation: Distillation | None = None
    """A term of the fitness that keeps the merged model near its parents on their own samples."""
    racing: bool = False
    """Whether candidates see the samples in growing slices, and one that does not lead stops early."""


def parse_align_section(content: dict[str, Any], file: str | os.PathLike[str]) -> AlignSection:
    """The checked `align:` section of a config's mapping; an empty one where it has none.

    Raises:
        InputError: a key is unknown or a value is not what it should be.
    """
    section = content.get("align")
    if section is None:
        return AlignSection()
    if not isinstance(section, dict):
        raise InputError.at(file, "align", found=type(section).__name__, expected="a mapping")
    return check_section(AlignSection, section, file)
