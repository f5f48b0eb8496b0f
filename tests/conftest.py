"""One smoke-scale demo world and one Ray cluster for all tests: real models, trained in seconds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

os.environ["HF_HUB_OFFLINE"] = "1"
# The models are too small to share out, and threads that wait take the processor from other work.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mergekit_align.demo import build_world

    directory = tmp_path_factory.mktemp("demo") / "world"
    build_world(directory, scale="smoke")
    return directory


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    import ray

    ray.shutdown()
    ray.init(include_dashboard=False)
    yield
    ray.shutdown()


@pytest.fixture
def write_config(world: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a small genome config that works, with sections changed as the test wants."""

    def write(
        genome: dict[str, Any] | None = None,
        tasks: list[Any] | None = None,
        align: dict[str, Any] | None = None,
    ) -> Path:
        content = {
            "genome": {
                "merge_method": "task_arithmetic",
                "base_model": f"{world}/base",
                "models": [f"{world}/aligned", f"{world}/expert-a"],
                **(genome or {}),
            },
            "tasks": tasks
            or [{"name": "response_alignment", "metric": "decision_logprob,none", "weight": 1.0}],
            "limit": 8,
            "align": {
                "data": f"{world}/data/validation.jsonl",
                "storage_path": f"{tmp_path}/evolved",
                "max_fevals": 4,
                "force_population_size": 4,
                **(align or {}),
            },
        }
        path = tmp_path / "genomic.yml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    return write
