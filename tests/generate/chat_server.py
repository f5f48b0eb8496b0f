"""An OpenAI-compatible chat server of a real model."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class ChatServer(ThreadingHTTPServer):
    """Answers `/v1/chat/completions` greedily; use it by `with`.

    Args:
        stops_after: answers after which every request is refused.
    """

    def __init__(self, directory: Path, *, stops_after: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.stops_after = stops_after
        self.answered = 0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/chat/completions"

    def __exit__(self, *details: object) -> None:
        self.shutdown()
        self.server_close()

    def answer(self, payload: dict[str, Any]) -> bytes:
        messages = [{key: m[key] for key in ("role", "content")} for m in payload["messages"]]
        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        settings = {"max_new_tokens": payload["max_tokens"], "do_sample": False}
        written = self.model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
        content = self.tokenizer.decode(written, skip_special_tokens=True)
        message = {"role": "assistant", "content": content}
        self.answered += 1
        return json.dumps({"choices": [{"index": 0, "message": message}]}).encode()


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        gone = server.stops_after is not None and server.answered >= server.stops_after
        body = b'{"error": "shut down"}' if gone else server.answer(payload)
        self.send_response(503 if gone else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *details: object) -> None:
        pass
