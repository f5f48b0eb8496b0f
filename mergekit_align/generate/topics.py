"""What questions are about: taxonomies, ours in `topics/`, a user's YAML file, or a list.

topics:
  - animal_welfare
  - {name: privacy, description: what is nobody else's business}
      - {name: violence, share: 2}      # twice as many questions as of the others
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_align.errors import InputError, closest
from mergekit_align.yaml_files import read_yaml_mapping


class Topic(NamedTuple):
    """What some of the questions are about."""

    name: str
    description: str = ""
    """For the writer."""
    share: float = 1.0
    """Of the questions, against the other topics'."""


def load_topics(given: str | Sequence[Any], where: str) -> list[Topic]:
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
    if isinstance(entry, dict) and set(entry) <= set(Topic._fields) and entry.get("name"):
        share = entry.get("share", 1)
        if not isinstance(share, int | float) or not 0 < share < float("inf"):
            raise InputError(f"{where}.share: found {share!r}; expected a number above 0")
        return Topic(str(entry["name"]), str(entry.get("description") or ""), float(share))
    raise InputError(
        f"{where}: found {entry!r}; expected a name, or `name` with `description` or `share`"
    )
