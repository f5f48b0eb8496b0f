"""Conversations answered by a model: in batches by length, shared out, resumable, always the same.

Conversations are sorted by their length, as lm-eval sorts them, and cut into chunks of one batch each,
so that a chunk is computed in the same way in any run. What is sampled is sampled by a seed of the
chunk's own. Every finished chunk is in a journal.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mergekit_align.checkpoints import context_window, read_checkpoint
from mergekit_align.errors import InputError, one_line
from mergekit_align.evaluate.models import Backend, ModelOnDemand, check_room, generates_locally
from mergekit_align.generate.config import PoolModel
from mergekit_align.generate.settings import Sampling
from mergekit_align.generate.template import Message
from mergekit_align.journal import Journal

FAR_CHUNK = 1024
"""Conversations in a chunk, of a backend that makes its own batches."""


class Reply(NamedTuple):
    """What a model said."""

    text: str
    cut: bool
    """Whether it ran into the limit of tokens, as far as can be told."""


class Worker:
    """This process's part in a stage.

    One model is in memory at a time, from the first chunk that it has to compute on.

    Args:
        journal: of the stage.
        rank: of this process, among `processes`.
        wait: for all processes to get here.
    """

    def __init__(
        self, journal: Journal, *, rank: int, processes: int, wait: Callable[[], None]
    ) -> None:
        self._journal = journal
        self._rank, self._processes, self._wait = rank, processes, wait
        self._model: PoolModel | None = None
        self._lm: ModelOnDemand | None = None
        self._tokenizer: Any = None
        self._window: int | None = None
        self.computed = 0
        """Conversations that this process has answered."""

    def replies(
        self,
        model: PoolModel,
        conversations: Sequence[Sequence[Message]],
        sampling: Sampling,
        *,
        key: str,
        seed: int,
    ) -> list[Reply]:
        """What a model says to conversations, in their order; every process gets all of it.

        Args:
            key: of this call among those of the stage.
            seed: of what is sampled.

        Raises:
            InputError: a conversation does not fit into the model's context window, or its server
                does not answer.
        """
        if not conversations:
            return []
        lm = self._open(model)
        rendered = [lm.apply_chat_template(list(messages)) for messages in conversations]
        lengths = [self._length(text) for text in rendered]
        check_room(model.name, self._window, max(lengths), sampling.max_tokens)
        order = sorted(range(len(rendered)), key=lambda index: (-lengths[index], index))
        size = _chunk_size(model.backend)
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        done = self._journal.chunks()
        for number, chunk in enumerate(chunks):
            name = f"{key}/{number}"
            if number % self._processes == self._rank and name not in done:
                texts = self._generate([rendered[index] for index in chunk], sampling, seed, name)
                self._journal.append(name, texts)
                self.computed += len(chunk)
        self._wait()
        done = self._journal.chunks()
        replies: dict[int, Reply] = {}
        for number, chunk in enumerate(chunks):
            for index, text in zip(chunk, done[f"{key}/{number}"], strict=True):
                replies[index] = Reply(text, self._is_cut(text, sampling.max_tokens))
        return [replies[index] for index in range(len(rendered))]

    def close(self) -> None:
        """Let the model leave memory."""
        if self._lm is not None:
            self._lm.unload()
        self._lm = self._model = None

    def _open(self, model: PoolModel) -> ModelOnDemand:
        if self._lm is None or model != self._model:
            self.close()
            self._tokenizer = self._window = None
            if not model.backend.is_server:
                config, self._tokenizer = read_checkpoint(model.model, model.name)
                self._window = context_window(config)
            self._lm = ModelOnDemand(model.model, model.backend, self._tokenizer)
            self._model = model
        return self._lm

    def _length(self, rendered: Any) -> int:
        if self._tokenizer is None:
            return len(str(rendered))
        return len(self._tokenizer(rendered, add_special_tokens=False).input_ids)

    def _is_cut(self, text: str, limit: int) -> bool:
        if self._tokenizer is None:
            return False
        # Tokens that a model chose one by one may come back as a few less.
        tokens = len(self._tokenizer(text, add_special_tokens=False).input_ids)
        return tokens >= limit - limit // 32

    def _generate(
        self, rendered: Sequence[Any], sampling: Sampling, seed: int, name: str
    ) -> list[str]:
        from lm_eval.api.instance import Instance
        from transformers import set_seed

        assert self._lm is not None
        assert self._model is not None
        settings = _generation_settings(sampling, self._model.backend)
        requests = [
            Instance(request_type="generate_until", doc={}, arguments=(text, settings), idx=0)
            for text in rendered
        ]
        set_seed(zlib.crc32(f"{seed} {name}".encode()))
        try:
            return [str(text) for text in self._lm.generate_until(requests)]
        except Exception as error:  # a server's client raises what it likes
            if not self._model.backend.is_server:
                raise
            reason = one_line(error)
            raise InputError(
                f"{self._model.name}: found no answer from its server ({reason}); what was answered "
                "is kept for the next run"
            ) from error


def _chunk_size(backend: Backend) -> int:
    return backend.batch_size if generates_locally(backend) else max(FAR_CHUNK, backend.batch_size)


def _generation_settings(sampling: Sampling, backend: Backend) -> dict[str, Any]:
    settings: dict[str, Any] = {"until": [], "max_gen_toks": sampling.max_tokens}
    if sampling.temperature == 0:
        return {**settings, "do_sample": False}
    settings |= {"do_sample": True, "temperature": sampling.temperature}
    settings |= {
        key: value for key in ("top_p", "top_k") if (value := getattr(sampling, key)) is not None
    }
    if backend.is_server:
        # lm-eval sends every request with the same seed, and the same prompt would be answered alike.
        settings["seed"] = None
    return settings
