"""What questions are about: taxonomies, ours in `topics/`, a user's YAML file, or a list.

topics:
  - animal_welfare
  - {name: privacy, description: what is nobody else's business}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_align.errors import InputError, closest
from mergekit_align.yaml_files import read_yaml_mapping


class Topic(NamedTuple):
    """A topic; its description, for the writer, may be empty."""

    name: str
    description: str = ""


def load_topics(given: str | Sequence[str], where: str) -> list[Topic]:
    """Topics of a list, of a YAML file, or ours by name.

    Args:
        where: what names them, as an error begins: a file and its key.

    Raises:
        InputError: there is no such file, or it does not hold topics, each once.
    """
    entries: Any = given
    if isinstance(given, str):
        file, where = _file(given, where)
        entries = read_yaml_mapping(file).get("topics")
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise InputError(f"{where}: found {entries!r}; expected a list of topics")
    topics = [_topic(entry, f"{where}[{index}]") for index, entry in enumerate(entries)]
    names = [topic.name for topic in topics]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{where}: found {name!r} twice; expected every topic once")
    return topics


def _file(name: str, where: str) -> tuple[Path, str]:
    directory = Path(__file__).parent / "topics"
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise InputError(f"{where}: found no file {name}; expected topics")
        return Path(name), f"{name}: topics"
    own = directory / f"{name}.yaml"
    if not own.is_file():
        known = sorted(file.stem for file in directory.glob("*.yaml"))
        raise InputError(
            f"{where}: found {name!r}; expected a list, a YAML file, or one of {', '.join(known)}"
            f"{closest(name, known)}"
        )
    return own, f"{own}: topics"


def _topic(entry: Any, where: str) -> Topic:
    if isinstance(entry, str) and entry.strip():
        return Topic(entry)
    if isinstance(entry, dict) and set(entry) <= {"name", "description"} and entry.get("name"):
        return Topic(str(entry["name"]), str(entry.get("description") or ""))
    raise InputError(f"{where}: found {entry!r}; expected a name, or a name and a description")
