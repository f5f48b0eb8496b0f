"""Models of the pool may be a server's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergekit_align.errors import InputError
from mergekit_align.generate import generate, read_config

from .chat_server import ChatServer


def served(pool: Path, server: ChatServer) -> list[Any]:
    """The pool with its refuser on a server."""
    arguments = {"base_url": server.url, "num_concurrent": 1, "max_retries": 1}
    refuser = {"model": "refuser", "backend": "local-chat-completions", "backend_args": arguments}
    return [refuser, f"{pool}/helper"]


def answers(directory: Path) -> list[Any]:
    lines = (directory / "answers.jsonl").read_text().splitlines()
    return [[json.loads(line)[key] for key in ("model", "response")] for line in lines]


def test_a_server_answers_as_its_model_does_here(
    config: Callable[..., Path], pool: Path, tmp_path: Path
) -> None:
    generate(read_config(config(output=f"{tmp_path}/here", samples=4)))
    with ChatServer(pool / "refuser") as server:
        path = config(models=served(pool, server), output=f"{tmp_path}/there", samples=4)
        generate(read_config(path))
        assert server.answered > 0
    assert answers(tmp_path / "there") == answers(tmp_path / "here")


def test_a_run_goes_on_when_its_server_is_back(
    config: Callable[..., Path], pool: Path, tmp_path: Path
) -> None:
    with ChatServer(pool / "refuser", stops_after=3) as server:
        path = config(models=served(pool, server), samples=4)
        with pytest.raises(InputError, match="refuser: found no answer from its server"):
            generate(read_config(path))
        server.stops_after = None
        generate(read_config(path))
    assert any(model == "refuser" for model, _ in answers(tmp_path / "generated"))
