"""An OpenAI-compatible completions server of a real model, which can fail as servers do."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, Literal

import torch
from model_server import ModelServer

Fault = Literal["says 500", "is no JSON", "is silent", "does not echo", "leaves out a prompt"]


class CompletionsServer(ModelServer):
    """Answers `/v1/completions` for token ids, with `echo` and `logprobs`.

    Like vLLM's, it refuses a prompt that leaves no room for the token that it writes.

    Args:
        stops_after: requests after which it is gone.
        fault: what is wrong with its answers.
    """

    place = "v1/completions"

    def __init__(
        self, directory: Path, *, stops_after: int | None = None, fault: Fault | None = None
    ) -> None:
        self.stops_after = stops_after
        self.fault = fault
        self.payloads: list[dict[str, Any]] = []
        self.closing = threading.Event()
        super().__init__(directory)

    @property
    def prompts(self) -> list[list[int]]:
        """Every prompt that was sent, in order."""
        return [prompt for payload in self.payloads for prompt in payload["prompt"]]

    def stop(self) -> None:
        self.closing.set()
        super().stop()

    def answer(self, payload: dict[str, Any]) -> tuple[int, bytes]:
        self.payloads.append(payload)
        status, body = self._answer(payload)
        if self.stops_after and len(self.payloads) >= self.stops_after:
            self.stop()
        return status, body

    def _answer(self, payload: dict[str, Any]) -> tuple[int, bytes]:
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
