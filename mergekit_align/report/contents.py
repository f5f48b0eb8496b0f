"""What a report says, section by section, whatever format it ends in."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mergekit_align.evaluate import Evaluation
from mergekit_align.report import study_figures, tables
from mergekit_align.report.evaluation_figure import skill_column, trade_off
from mergekit_align.report.evaluation_file import read_evaluation
from mergekit_align.report.examples import Example, examples
from mergekit_align.report.figures import Figure
from mergekit_align.report.study_file import StudyRecord, read_study
from mergekit_align.report.tables import Table

MAX_CONFIG = 50_000
"""Characters of a model's config that are shown."""


class Text(NamedTuple):
    """A text to be shown as it is."""

    title: str
    text: str


class Section(NamedTuple):
    """One evaluation or one search."""

    key: str
    title: str
    path: str
    lead: list[str]
    """Sentences for a reader."""
    figures: list[Figure]
    tables: list[Table]
    examples: dict[str, list[Example]]
    reproduce: list[Text]
    models: Sequence[str] = ()
    """Those that can be the chosen one, by name."""
    columns: Sequence[str] = ()
    """Those that can be set against alignment."""


def read_section(
    path: str | os.PathLike[str],
    key: str,
    *,
    chosen: str | None = None,
    skill: str | None = None,
    count: int = 8,
) -> Section:
    """The section of an evaluation's JSON file, or of a search's study.

    Args:
        key: names it among the sections of a page: letters and digits.
        chosen: the model that is marked, where it is one of those evaluated.
        skill: the column that is set against alignment, where there is such a one.
        count: example prompts of each type.

    Raises:
        InputError: the file is neither.
    """
    if is_evaluation(path):
        return _of_evaluation(read_evaluation(path), os.fspath(path), key, chosen, skill, count)
    return _of_study(read_study(path), key)


def is_evaluation(path: str | os.PathLike[str]) -> bool:
    """Whether a file, by its name, is an evaluation and not a study."""
    return os.fspath(path).endswith(".json")


def _of_evaluation(
    evaluation: Evaluation, path: str, key: str, chosen: str | None, skill: str | None, count: int
) -> Section:
    across = skill if skill in evaluation.columns else skill_column(evaluation)
    figure = trade_off(evaluation, across, chosen, key) if across else None
    return Section(
        key,
        "Evaluation",
        path,
        evaluation.notes,
        [figure] if figure else [],
        [tables.comparison(evaluation), *tables.categories(evaluation)],
        examples(evaluation, count),
        _reproduce(evaluation),
        list(evaluation.models),
        list(evaluation.columns),
    )


def _of_study(study: StudyRecord, key: str) -> Section:
    config = dict(study.config)
    failed = [each for each in study.candidates if each.evaluation.values is None]
    lead = [
        f"{len(study.candidates)} evaluations by the searcher {config.get('searcher')}, "
        f"{sum(each.evaluation.seconds for each in study.candidates):.0f} s of evaluation in all."
    ]
    stopped = sum(each.evaluation.stopped is not None for each in study.candidates)
    if stopped:
        lead.append(f"{stopped} lost their race early and have estimates.")
    if failed:
        lead.append(f"{len(failed)} failed, the last one so: {failed[-1].evaluation.failure}.")
    if study.best is None:
        lead.append("No candidate has been scored yet.")
    elif study.best.evaluation.violation:
        lead.append("No candidate keeps all floors; the chosen one misses least.")
    axes = study_figures.axes_of(study)
    shown = [("the chosen one", study.best)] if study.best else []
    if study.candidates and study.candidates[0].evaluation.values is not None:
        shown.append(("the first one", study.candidates[0]))
    if axes is not None:
        shown += [("on the front", each) for each in study_figures.front(study, axes)[::-1][:30]]
    found = [tables.candidates(study, shown)] if shown else []
    chosen_genes = tables.genes(study)
    config["genes"] = f"{len(study.genes)}, in the table above"
    return Section(
        key,
        "Search",
        study.path,
        lead,
        study_figures.figures(study, key),
        [*found, *([chosen_genes] if chosen_genes else [])],
        {},
        [Text("What was searched", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))],
    )


def _reproduce(evaluation: Evaluation) -> list[Text]:
    settings = yaml.safe_dump(dict(evaluation.settings), sort_keys=False, allow_unicode=True)
    found = [
        Text("Settings and versions", settings),
        Text("Models", yaml.safe_dump(evaluation.models, sort_keys=False, allow_unicode=True)),
    ]
    command = _command(evaluation)
    if command is not None:
        found.insert(0, Text("Command", command))
    for name, model in evaluation.models.items():
        config = Path(model) / "mergekit_config.yml"
        if config.is_file():
            text = config.read_text(encoding="utf-8", errors="replace")
            found.append(Text(f"{name}: {config}", text[:MAX_CONFIG]))
    return found


def _command(evaluation: Evaluation) -> str | None:
    """The command of these settings; `None` where the prompts came from no file."""
    settings = evaluation.settings
    if not settings.get("data") and not settings.get("tasks"):
        return None
    words = ["mergekit-align-evaluate", *evaluation.models.values()]
    for name in evaluation.models:
        words += ["--name", name]
    for file in settings.get("data") or []:
        words += ["--data", file]
    if settings.get("tasks"):
        words += ["--tasks", ",".join(settings["tasks"])]
    for key in ("guard", "guard_profile", "limit", "seed", "max_tokens", "device", "batch_size"):
        words += _option(key, settings.get(key))
    if settings.get("guard"):
        words += _option("threshold", settings.get("threshold"))
    if settings.get("backend") != "hf":
        words += _option("backend", settings.get("backend"))
    if settings.get("backend_args"):
        pairs = (f"{key}={value}" for key, value in settings["backend_args"].items())
        words += ["--backend-args", ",".join(pairs)]
    for place in settings.get("task_search_path") or []:
        words += ["--task-search-path", place]
    if settings.get("apply_chat_template") is False:
        words.append("--no-apply-chat-template")
    return shlex.join(words)


def _option(key: str, value: Any) -> Sequence[str]:
    return [] if value is None else [f"--{key.replace('_', '-')}", str(value)]
