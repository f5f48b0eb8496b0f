"""An OpenAI-compatible chat server of a real model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model_server import ModelServer
from transformers import AutoTokenizer


class ChatServer(ModelServer):
    """Answers `/v1/chat/completions` greedily.

    Args:
        stops_after: answers after which every request is refused.
    """

    place = "v1/chat/completions"

    def __init__(self, directory: Path, *, stops_after: int | None = None) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.stops_after = stops_after
        self.answered = 0
        super().__init__(directory)

    def answer(self, payload: dict[str, Any]) -> tuple[int, bytes]:
        if self.stops_after is not None and self.answered >= self.stops_after:
            return 503, b'{"error": "shut down"}'
        messages = [{key: m[key] for key in ("role", "content")} for m in payload["messages"]]
        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        settings = {"max_new_tokens": payload["max_tokens"], "do_sample": False}
        written = self.model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
        content = self.tokenizer.decode(written, skip_special_tokens=True)
        message = {"role": "assistant", "content": content}
        self.answered += 1
        return 200, json.dumps({"choices": [{"index": 0, "message": message}]}).encode()
