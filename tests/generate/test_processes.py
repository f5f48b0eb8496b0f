"""Runs that are killed, and runs in two processes: the same files as one run without a break."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mergekit_align.generate import generate, read_config
from mergekit_align.generate.settings import STAGES

from .test_run import contents

pytestmark = pytest.mark.slow


def test_a_run_that_is_killed_in_every_stage_writes_the_same_files(
    config: Callable[..., Path], tmp_path: Path
) -> None:
    path = config(samples=4)
    generate(read_config(path, {"output": str(tmp_path / "whole")}))
    script = Path(__file__).with_name("killed_runs.py")
    killed = subprocess.run(
        [sys.executable, script, path], check=True, capture_output=True, text=True
    )
    assert killed.stdout.split() == [stage for stage in STAGES for _ in range(2)]
    assert contents(tmp_path / "generated") == contents(tmp_path / "whole")


def test_two_processes_write_the_same_files_as_one(
    config: Callable[..., Path], tmp_path: Path
) -> None:
    path = config(samples=4)
    generate(read_config(path, {"output": str(tmp_path / "whole")}))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command = [*launch, "-m", "mergekit_align.cli.generate", str(path)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert contents(tmp_path / "generated") == contents(tmp_path / "whole")
    assert result.stdout.count("answers to") == 1
