"""One smoke-scale demo world for all tests: real models, trained in seconds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mergekit_align.demo import build_world

    directory = tmp_path_factory.mktemp("demo") / "world"
    build_world(directory, scale="smoke")
    return directory
