"""Commands by name, ours and stock ones, as click has them; a folder in which documented ones run."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

import click

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    script.name: script
    for script in importlib.metadata.entry_points(group="console_scripts")
    if script.name.startswith("mergekit-")
}
OURS = sorted(name for name in SCRIPTS if name.startswith("mergekit-align-"))


def command(name: str) -> click.Command:
    main = SCRIPTS[name].load()
    assert isinstance(main, click.Command)
    return main


def lay_out(directory: Path, world: Path) -> None:
    """The examples, and `world` under the name that the documents give it."""
    shutil.copytree(ROOT / "examples", directory / "examples", dirs_exist_ok=True)
    (directory / "demo-world").mkdir()
    for place in world.iterdir():
        (directory / "demo-world" / place.name).symlink_to(place)
