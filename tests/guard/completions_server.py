"""An OpenAI-compatible completions server of a real model, which can fail as servers do."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM

Fault = Literal["says 500", "is no JSON", "is silent", "does not echo", "leaves out a prompt"]


class CompletionsServer(ThreadingHTTPServer):
    """Answers `/v1/completions` for token ids, with `echo` and `logprobs`; use it by `with`.

    Like vLLM's, it refuses a prompt that leaves no room for the token that it writes.

    Args:
        stops_after: requests after which it is gone.
        fault: what is wrong with its answers.
    """

    def __init__(
        self, directory: Path, *, stops_after: int | None = None, fault: Fault | None = None
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.stops_after = stops_after
        self.fault = fault
        self.payloads: list[dict[str, Any]] = []
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/completions"

    @property
    def prompts(self) -> list[list[int]]:
        """Every prompt that was sent, in order."""
        return [prompt for payload in self.payloads for prompt in payload["prompt"]]

    def stop(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def __exit__(self, *details: object) -> None:
        self.stop()

    def handle_error(self, *details: object) -> None:
        """A client that waits no longer is no error."""

    def answer(self, payload: dict[str, Any]) -> tuple[int, bytes]:
        """Status and body."""
        if self.fault == "says 500":
            return 500, b'{"error": "the engine\n is dead"}'
        if self.fault == "is no JSON":
            return 200, b"<html>"
        if self.fault == "is silent":
            self.closing.wait()
        prompts, window = payload["prompt"], self.model.config.max_position_embeddings
        if not all(isinstance(token, int) for prompt in prompts for token in prompt):
            return 400, b"expected token ids"
        if max(map(len, prompts)) + payload["max_tokens"] > window:
            return 400, f"longer than {window} tokens".encode()
        choices = [
            {"index": index, "text": "", "logprobs": self._logprobs(prompt, payload)}
            for index, prompt in enumerate(prompts)
        ]
        if self.fault == "leaves out a prompt":
            choices.pop()
        # A server may finish them in any order.
        return 200, json.dumps({"object": "text_completion", "choices": choices[::-1]}).encode()

    @torch.inference_mode()
    def _logprobs(self, prompt: list[int], payload: dict[str, Any]) -> dict[str, Any]:
        assert payload["echo"]
        assert (payload["logprobs"], payload["max_tokens"]) == (1, 1)
        logprobs = self.model(torch.tensor([prompt])).logits[0].float().log_softmax(1)
        likeliest = logprobs.max(1)
        tokens = [*prompt, int(likeliest.indices[-1])]
        chosen = logprobs[range(len(prompt)), tokens[1:]]
        tops = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        found: dict[str, list[Any]] = {
            "tokens": [f"token_id:{token}" for token in tokens],
            "token_logprobs": [None, *chosen.tolist()],
            "top_logprobs": [None, *({f"token_id:{token}": value} for token, value in tops)],
        }
        written = -1 if self.fault == "does not echo" else 0
        return {key: values[written:] for key, values in found.items()}


class _Handler(BaseHTTPRequestHandler):
    server: CompletionsServer

    def do_POST(self) -> None:
        server = self.server
        server.payloads.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        status, body = server.answer(server.payloads[-1])
        if server.stops_after and len(server.payloads) >= server.stops_after:
            server.stop()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *details: object) -> None:
        pass
