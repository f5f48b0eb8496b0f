"""YAML files of the user's: read, and their mistakes as one line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from mergekit_align.errors import InputError, closest, one_line

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration

Section = TypeVar("Section", bound=BaseModel)


def read_yaml_mapping(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: the file is missing, not UTF-8, not YAML, or holds something else.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: found no such file; expected a YAML config") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: found a directory; expected a YAML config") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: found bytes that are not UTF-8 at {error.start}") from error
    except yaml.YAMLError as error:
        problem = one_line(error, 1000)
        raise InputError(f"{path}: found text that is not YAML ({problem})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: found {type(content).__name__}; expected a mapping")
    return content


def input_error(error: ValidationError, file: str | os.PathLike[str], *, prefix: str) -> InputError:
    """pydantic's first complaint as one line that names file, key, found and expected."""
    problem = error.errors()[0]
    key = ".".join([prefix, *(str(part) for part in problem["loc"])]).strip(".")
    if problem["type"] == "missing":
        return InputError.at(file, key, found="nothing", expected="a value")
    return InputError.at(file, key, found=repr(problem["input"])[:80], expected=problem["msg"])


def check_section(
    kind: type[Section],
    section: Mapping[str, Any],
    file: str | os.PathLike[str],
    *,
    prefix: str = "align",
    explained: str = "docs/reference.md#the-align-section",
) -> Section:
    """A section of a config, by default the one under `align:`, as a model of its `kind`.

    Args:
        explained: the page on its keys, for whoever got one wrong.

    Raises:
        InputError: a key is unknown (gives the closest), or a value is not what it should be.
    """
    known = kind.model_fields
    for key in section:
        if key not in known:
            raise InputError.at(
                file,
                f"{prefix}.{key}".strip("."),
                found="an unknown key",
                expected=f"one of {', '.join(known)}{closest(str(key), known)}; see {explained}",
            )
    try:
        return kind.model_validate(section)
    except ValidationError as error:
        raise InputError(f"{input_error(error, file, prefix=prefix)}; see {explained}") from error


def as_merge_config(content: Mapping[str, Any], file: str | os.PathLike[str]) -> MergeConfiguration:
    """A file's mapping as mergekit's own config.

    Raises:
        InputError: it is none.
    """
    from mergekit.config import MergeConfiguration

    try:
        return MergeConfiguration.model_validate(content)
    except ValidationError as error:
        raise input_error(error, file, prefix="") from error
    except RuntimeError as error:
        raise InputError(f"{os.fspath(file)}: {error}") from error
