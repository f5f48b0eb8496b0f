"""What a merged model's card says of its safety: text for people, metadata for the hub."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mergekit_align.checks import File
from mergekit_align.errors import InputError, one_line
from mergekit_align.evaluate import Column, Evaluation, Score
from mergekit_align.files import write_text
from mergekit_align.report.evaluation_file import read_evaluation
from mergekit_align.report.tables import Cell, Table, categories
from mergekit_align.report.text import visible

BEGIN, END = "<!-- safety: begin -->", "<!-- safety: end -->"
"""Around the section, so that a later evaluation's takes its place."""
_TASK = "mergekit-align-evaluate"
"""Tells our results in the metadata from others'."""


def add_safety_section(
    model: File, evaluation: File | Evaluation, *, name: str | None = None
) -> Path:
    """Put what an evaluation found into the `README.md` of a model that it evaluated.

    The card stays as it is, but for a section on safety and, in its metadata, a tag and the scores as
    `model-index`. Doing it again replaces both.

    Args:
        model: its directory.
        evaluation: or the JSON file of one.
        name: the model's in the evaluation; by default the one of this directory.

    Raises:
        InputError: there is no such model in the evaluation, or its card's metadata cannot be read.
    """
    found = evaluation if isinstance(evaluation, Evaluation) else read_evaluation(evaluation)
    directory = Path(model)
    if not directory.is_dir():
        raise InputError(f"{directory}: found no such directory; expected a model")
    own = name if name is not None else _name_of(directory, found)
    if own not in found.models:
        raise InputError(f"--chosen: found {own!r}; expected one of {', '.join(found.models)}")
    card = directory / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {directory.resolve().name}\n"
    metadata, body = _split(text, card)
    metadata = {**metadata, **_metadata(metadata, found, own, directory.resolve().name)}
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    section = f"{BEGIN}\n{safety_section(found, own)}{END}\n"
    write_text(card, f"---\n{head}---\n{_put(body, section)}")
    return card


def safety_section(evaluation: Evaluation, name: str) -> str:
    """The section of one model, in Markdown."""
    first = next(iter(evaluation.models))
    against = [] if name == first else [f"difference from {first}"]
    table = Table(
        "Safety", ["measure", "score", "95% interval", "prompts", "not readable", *against], []
    )
    for key, column in evaluation.columns.items():
        score = column.scores[name]
        row = [_label(key, column), *_texts(score, column.is_rate)]
        row += [str(score.n), str(score.unscored)]
        if against:
            row.append(_difference(score, column.is_rate))
        table.rows.append([Cell([each], each) for each in row])
    parts = [
        table.markdown().replace("### Safety", "## Safety", 1),
        "\n".join(f"- {_plain(note)}" for note in _notes(evaluation)) + "\n",
    ]
    for found in categories(evaluation):
        rows = [row for row in found.rows if row[0].lines == [name]]
        parts.append(found._replace(rows=rows).markdown())
    parts.append(
        "An automatic judge errs, and prompts are a sample: what was not asked was not measured.\n"
    )
    return visible("\n".join(parts))


def _notes(evaluation: Evaluation) -> Iterator[str]:
    settings = evaluation.settings
    # The notes on brackets and on differences are about another table.
    yield from (
        note for note in evaluation.notes if not note.startswith(("In brackets", "Below a"))
    )
    data = [os.path.basename(file) for file in settings.get("data") or []]
    if data:
        yield f"Prompts: {', '.join(data)}."
    yield (
        f"Greedy answers of at most {settings.get('max_tokens')} tokens, in {settings.get('dtype')}; "
        "rates have Wilson's interval, differences the paired bootstrap's."
    )
    packages = ("mergekit-align", "lm_eval", "transformers", "torch")
    yield f"By {', '.join(f'{each} {settings[each]}' for each in packages if each in settings)}."


def _metadata(
    metadata: dict[str, Any], evaluation: Evaluation, name: str, title: str
) -> dict[str, Any]:
    """Tags and `model-index`, which other evaluations' results stay in."""
    tags = metadata.get("tags") or []
    tags = [tags] if isinstance(tags, str) else list(tags)
    known = metadata.get("model-index") or []
    entry: dict[str, Any] = known[0] if known else {"name": title, "results": []}
    others = [
        each for each in entry.get("results") or [] if (each.get("task") or {}).get("name") != _TASK
    ]
    results = [*others, *_results(evaluation, name)]
    return {
        "tags": list(dict.fromkeys([*tags, "mergekit-align"])),
        "model-index": [{**entry, "results": results}, *known[1:]],
    }


def _results(evaluation: Evaluation, name: str) -> Iterator[dict[str, Any]]:
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    files = [Path(file).stem for file in evaluation.settings.get("data") or []]
    for key, column in evaluation.columns.items():
        score = column.scores[name]
        if math.isnan(score.value):
            continue
        ours = key in ("alignment", "over_refusal", "task")
        dataset = ("+".join(files) or "samples") if ours else key
        result = EvalResult(
            task_type="text-generation",
            task_name=_TASK,
            dataset_type=dataset,
            dataset_name=f"{dataset} ({score.n} prompts)",
            metric_type=key,
            metric_name=_label(key, column),
            metric_value=round(score.value * (100 if column.is_rate else 1), 4),
        )
        # The hub's own function says what an entry looks like.
        yield from eval_results_to_model_index(name, [result])[0]["results"]


def _split(text: str, card: Path) -> tuple[dict[str, Any], str]:
    """A card's metadata and the rest."""
    lines = text.splitlines(keepends=True)
    ends = [number for number, line in enumerate(lines) if line.rstrip() == "---"]
    if len(ends) < 2 or ends[0] != 0:
        return {}, text
    try:
        metadata = yaml.safe_load("".join(lines[1 : ends[1]])) or {}
    except yaml.YAMLError as error:
        problem = one_line(error, 1000)
        raise InputError(f"{card}: found metadata that is not YAML ({problem})") from error
    if not isinstance(metadata, dict):
        raise InputError(f"{card}: found metadata that is no mapping; expected one")
    return metadata, "".join(lines[ends[1] + 1 :])


def _put(body: str, section: str) -> str:
    before, begin, rest = body.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        return f"{before}{section}{after.lstrip()}"
    return f"{body.rstrip()}\n\n{section}"


def _name_of(directory: Path, evaluation: Evaluation) -> str:
    same = [
        name
        for name, path in evaluation.models.items()
        if os.path.realpath(path) == os.path.realpath(directory)
    ]
    if not same:
        known = ", ".join(f"{name} ({path})" for name, path in evaluation.models.items())
        raise InputError(
            f"{directory}: found no such model in the evaluation; expected one of {known}, or its name "
            "by --chosen"
        )
    return same[0]


def _label(key: str, column: Column) -> str:
    return f"{key.replace('_', '-')}: {column.title}" if key != column.title else key


def _texts(score: Score, is_rate: bool) -> list[str]:
    if math.isnan(score.value):
        return ["not known", ""]
    interval = (
        ""
        if math.isnan(score.low)
        else f"{_show(score.low, is_rate)} to {_show(score.high, is_rate)}"
    )
    return [f"{_show(score.value, is_rate)}{' %' if is_rate else ''}", interval]


def _difference(score: Score, is_rate: bool) -> str:
    found = score.difference
    if found is None or math.isnan(found.value):
        return ""
    value, low, high = (_show(each, is_rate, "+") for each in found[:3])
    return value if math.isnan(found.low) else f"{value} ({low} to {high})"


def _show(value: float, is_rate: bool, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}" if is_rate else f"{value:{sign}.3f}"


def _plain(text: str) -> str:
    """On one line, and no tag."""
    return " ".join(text.split()).replace("<", "&lt;")
