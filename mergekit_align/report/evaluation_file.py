"""What `mergekit-align-evaluate` wrote, read back."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from mergekit_align.errors import InputError
from mergekit_align.evaluate.report import Evaluation
from mergekit_align.samples import SampleType
from mergekit_align.yaml_files import input_error


class _Verdict(BaseModel):
    label: str
    p_unsafe: float | None
    categories: list[str]


class _Answer(BaseModel):
    response: str
    outcome: float | None
    refusal: str
    verdict: _Verdict | None = None


class _Prompt(BaseModel):
    prompt: str
    type: SampleType
    category: str | None
    expected: str
    models: dict[str, _Answer]


_EVALUATION = TypeAdapter(Evaluation)
_PROMPTS = TypeAdapter(list[_Prompt])


def read_evaluation(path: str | os.PathLike[str]) -> Evaluation:
    """The evaluation in a JSON file.

    Raises:
        InputError: it cannot be read, or is none.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: found no file to read ({error.strerror}); expected one"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: found bytes that are not UTF-8 at {error.start}") from error
    except ValueError as error:
        raise InputError(f"{path}: found text that is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: found {type(content).__name__}; expected an evaluation")
    for key in ("models", "columns", "answers", "settings"):
        if key not in content:
            raise InputError.at(
                path, key, found="nothing", expected="what mergekit-align-evaluate writes"
            )
    try:
        _PROMPTS.validate_python(content["answers"])
        evaluation = _EVALUATION.validate_python(
            {**content, "columns": _columns(content["columns"])}
        )
    except ValidationError as error:
        raise input_error(error, path, prefix="") from error
    _check_models(evaluation, path)
    return evaluation


def _columns(given: Any) -> Any:
    """The columns as `Evaluation` has them: `scores` for `models`, NaN for null."""
    if not isinstance(given, dict) or not all(isinstance(each, dict) for each in given.values()):
        return given
    return {
        name: {
            "title": column.get("title"),
            "is_rate": column.get("is_rate"),
            "outcomes": column.get("outcomes") or {},
            "scores": _scores(column.get("models")),
        }
        for name, column in given.items()
    }


def _scores(given: Any) -> Any:
    if not isinstance(given, dict) or not all(isinstance(each, dict) for each in given.values()):
        return given
    return {
        model: {
            **_with_nan(score),
            "difference": _with_nan(score["difference"]) if score.get("difference") else None,
        }
        for model, score in given.items()
    }


def _with_nan(score: dict[str, Any]) -> dict[str, Any]:
    unknown = {key: math.nan for key in ("value", "low", "high") if score.get(key) is None}
    return {**score, **unknown}


def _check_models(evaluation: Evaluation, path: str | os.PathLike[str]) -> None:
    expected = f"the models {', '.join(evaluation.models)}"
    for name, column in evaluation.columns.items():
        if set(column.scores) != set(evaluation.models):
            raise InputError.at(
                path,
                f"columns.{name}.models",
                found=", ".join(column.scores) or "none",
                expected=expected,
            )
    for index, answer in enumerate(evaluation.answers):
        if set(answer["models"]) != set(evaluation.models):
            found = ", ".join(answer["models"]) or "none"
            raise InputError.at(path, f"answers[{index}].models", found=found, expected=expected)
