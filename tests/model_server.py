"""A loopback server of a real model: what OpenAI-compatible servers of tests have in common."""

from __future__ import annotations

import json
import threading
from abc import abstractmethod
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM


class ModelServer(ThreadingHTTPServer):
    """Answers JSON requests with JSON; use it by `with`."""

    place: ClassVar[str]
    """What the address ends with."""

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{self.place}"

    @abstractmethod
    def answer(self, payload: dict[str, Any]) -> tuple[int, bytes]:
        """Status and body."""

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def __exit__(self, *details: object) -> None:
        self.stop()

    def handle_error(self, *details: object) -> None:
        """A client that waits no longer is no error."""


class _Handler(BaseHTTPRequestHandler):
    server: ModelServer

    def do_POST(self) -> None:
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, body = self.server.answer(payload)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *details: object) -> None:
        pass
