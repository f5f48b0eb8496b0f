"""The data card: what the samples are, where they come from, and how many there are."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

import yaml

import mergekit_align
from mergekit_align import markdown
from mergekit_align.generate.config import Config
from mergekit_align.generate.funnel import Funnel, tables
from mergekit_align.samples import SAMPLE_TYPES, SampleType

_INTRODUCTION = """\
# Generated samples

Prompts and the responses that are wanted of a merged model, made by `mergekit-align-generate`
{version} from {date} on. `alignment`: prompts that a model should refuse, and a refusal by one of the
models below, which the guard judged safe. `benign`: harmless prompts that may look unsafe, answered
helpfully. `task`: questions of a domain with its expert's answers, which nobody has checked.

Models wrote this. Beside the samples, `answers.jsonl` holds everything that the models answered, what
is unsafe included.
"""


def card(
    config: Config, counts: Mapping[str, Mapping[SampleType, int]], funnel: Funnel, date: str
) -> str:
    """The card as Markdown, with the metadata that a hub reads.

    Args:
        counts: samples of each type, by split.
        date: of the run's beginning.
    """
    settings = config.settings
    files = [{"split": name, "path": f"data/{name}.jsonl"} for name in counts]
    metadata = {
        **({"license": settings.licence} if settings.licence else {}),
        **({"language": settings.language} if settings.language else {}),
        "tags": ["synthetic", "mergekit-align"],
        "configs": [{"config_name": "default", "data_files": files}],
    }
    types = [kind for kind in SAMPLE_TYPES if any(part.get(kind) for part in counts.values())]
    sections = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n",
        _INTRODUCTION.format(version=mergekit_align.__version__, date=date),
        "## Samples\n",
        markdown.table(
            ["split", *types],
            [[name, *(str(part.get(kind, 0)) for kind in types)] for name, part in counts.items()],
        ),
        "## Models\n",
        markdown.table(["name", "model", "part", "backend", "licence"], _models(config)),
        "## From asked to kept\n",
        *(markdown.table(headers, rows) for headers, rows in tables(funnel) if rows),
        "## Settings\n",
        f"```yaml\n{_settings(config)}```\n",
    ]
    return "\n".join(sections)


def _models(config: Config) -> list[list[str]]:
    experts = {asked.expert: asked.domain for asked in config.asked if asked.expert}
    rows = []
    for model in config.pool:
        part = "answers" + (f", expert of {experts[model.name]}" if model.name in experts else "")
        rows.append(
            [model.name, model.model, part, model.backend.name, model.licence or "not given"]
        )
    for asked in config.asked:
        writer = asked.writer
        if writer is not None:
            row = [writer.name, writer.model, f"asks: {asked.key}", writer.backend.name]
            rows.append([*row, writer.licence or "not given"])
        elif asked.origin:
            rows.append([asked.origin, asked.origin, f"prompts: {asked.key}", "", "not given"])
    guard = config.settings.guard
    if guard is not None:
        rows.append(["guard", guard.model, "judges", guard.backend or "hf", "not given"])
    return rows


def _settings(config: Config) -> str:
    dumped = config.settings.model_dump(exclude_defaults=True, exclude={"output", "models"})
    versions = {name: version(name) for name in ("lm_eval", "transformers", "torch")}
    return yaml.safe_dump({**dumped, "versions": versions}, sort_keys=False, allow_unicode=True)
