"""An evaluation as `mergekit-align-evaluate` writes it, and a study as `mergekit-align-evolve` does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_inputs import make_evaluation, write_study_to

from mergekit_align.evaluate import save


@pytest.fixture
def evaluation_file(tmp_path: Path) -> Path:
    return save(make_evaluation(), tmp_path / "evaluation")[0]


@pytest.fixture
def write_study(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str = "study.journal", **options: Any) -> Path:
        return write_study_to(tmp_path / name, **options)

    return write
