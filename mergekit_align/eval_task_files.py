"""Where the package's lm-eval task directories are."""

from __future__ import annotations

from pathlib import Path


def eval_tasks_path() -> Path:
    """The `eval_tasks` directory: inside the package in a wheel, beside it in a source tree."""
    package = Path(__file__).resolve().parent
    inside = package / "eval_tasks"
    return inside if inside.is_dir() else package.parent / "eval_tasks"
