"""The page of results says what the committed files say, and no more."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
SCRIPT = REPOSITORY / "benchmarks" / "results.py"


@pytest.fixture(scope="module")
def results() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["results"] = module  # where its NamedTuples look their types up
    spec.loader.exec_module(module)
    return module


def test_the_committed_page_is_made_from_the_committed_files(results: ModuleType) -> None:
    committed = (REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8")
    assert committed == results.page(REPOSITORY / "docs" / "results")


def test_each_committed_file_is_named_and_none_has_a_place_on_a_machine() -> None:
    committed = (REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8")
    for file in (REPOSITORY / "docs" / "results").iterdir():
        assert f"(results/{file.name})" in committed
        assert not re.search(r"[\"' ]/\w+/", file.read_text(encoding="utf-8"))


def rates(*percent: float) -> dict[str, float]:
    names = ("alignment", "over_refusal", "task")
    return {name: each / 100 for name, each in zip(names, percent, strict=True)}


def test_a_table_of_merge_methods_has_means_and_ranges(results: ModuleType, tmp_path: Path) -> None:
    def world(alignment: float) -> dict[str, Any]:
        resta = {"default": rates(alignment, 10, 50), "best": rates(90, 5, 60), "seconds": 2.0}
        return {"base": {"default": rates(1, 0, 13)}, "resta": resta}

    worlds = {"a": world(70), "b": world(80)}
    record = {"dtype": "float32", "worlds": worlds, "ours": ["resta"]}
    (tmp_path / "merge_table.json").write_text(json.dumps(record))
    lines = results.page(tmp_path).splitlines()
    default = "| resta (here) | default | 75.0 (70.0 to 80.0) | 10.0 (10.0 to 10.0) "
    (row,) = (line for line in lines if line.startswith(default))
    assert row.endswith("| 115.0 (110.0 to 120.0) | 2.0 (2.0 to 2.0) |")


def test_an_evaluation_is_taken_in_without_answers_and_places(
    results: ModuleType, tmp_path: Path
) -> None:
    record = {
        "columns": {},
        "judged_by_guard": True,
        "models": {"m": "/home/someone/world/aligned"},
        "notes": ["by the guard /home/someone/world/guard (a profile)"],
        "answers": [{"prompt": "a"}],
    }
    (tmp_path / "e.json").write_text(json.dumps(record))
    taken = results.add(f"{tmp_path}/e.json=other.json", tmp_path / "results")
    assert json.loads(taken.read_text()) == {
        "columns": {},
        "judged_by_guard": True,
        "models": {"m": "world/aligned"},
        "notes": ["by the guard world/guard (a profile)"],
    }


@pytest.mark.parametrize("content", ['{"something": 1}', "[1]", "not JSON"])
def test_another_file_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "other.json").write_text(content)
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--out", str(tmp_path / "page.md")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "other.json" in result.stderr
    assert not (tmp_path / "page.md").exists()
