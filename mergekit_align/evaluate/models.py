"""Models that answer through lm-eval's backends, and remember on disk what they answered.

lm-eval's `CachingLM` keeps every answer under a hash of the request, which holds the rendered prompt
and the generation settings; it writes as answers come, so that a killed run loses none of them. Here
it has one database a model, named by a fingerprint of all else that an answer depends on: the
model's files, the backend with its arguments and floating type, and the versions of lm-eval and
transformers. Batch size is not among them: in bfloat16 it may change a token in thousands.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_align.checkpoints import context_window, read_checkpoint
from mergekit_align.checks import local_config
from mergekit_align.devices import check_device, default_device, default_dtype
from mergekit_align.errors import InputError, closest
from mergekit_align.fingerprint import commit, model_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_SIZE = 64
_TEMPLATE_ARGUMENTS = {"enable_thinking", "chat_template_args", "tokenizer"}


class Backend(NamedTuple):
    """How models are run: an lm-eval model by name, its arguments, device and batch size."""

    name: str
    arguments: Mapping[str, Any]
    device: str
    batch_size: int

    @property
    def dtype(self) -> str:
        """Floating type of the weights."""
        default = str(default_dtype(self.device)).removeprefix("torch.")
        return str(self.arguments.get("dtype", default))

    @property
    def is_server(self) -> bool:
        """Whether the models live elsewhere, so that there is nothing to look at here."""
        from lm_eval.models.api_models import TemplateAPI

        return issubclass(_model_class(self.name), TemplateAPI)

    def load(self, model: str) -> Any:
        """The lm-eval model."""
        arguments = {"model" if self.is_server else "pretrained": model, **self.arguments}
        if not self.is_server:
            arguments["dtype"] = self.dtype
        settings = {"batch_size": self.batch_size, "device": self.device}
        return _model_class(self.name).create_from_arg_obj(arguments, settings)


def make_backend(
    name: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    device: str | None = None,
    batch_size: int | None = None,
) -> Backend:
    """A backend with defaults filled in.

    Raises:
        InputError: lm-eval knows no such model, or there is no such device.
    """
    from lm_eval.api.registry import MODEL_REGISTRY

    try:
        _model_class(name)
    except ValueError as error:
        raise InputError(
            f"backend: found {name!r}; expected an lm-eval model{closest(name, MODEL_REGISTRY)}"
        ) from error
    device = device or default_device()
    check_device(device, "--device")
    return Backend(name, dict(arguments or {}), device, batch_size or BATCH_SIZE)


def generates_locally(backend: Backend) -> bool:
    """Whether lm-eval makes the batches, of a model in this process."""
    from lm_eval.models.huggingface import HFLM

    return issubclass(_model_class(backend.name), HFLM)


def _model_class(name: str) -> Any:
    from lm_eval.api.registry import get_model

    return get_model(name)


def check_model(
    model: str, backend: Backend, *, longest: str, max_tokens: int
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model that can be chatted with; `None` for one on a server.

    Args:
        longest: the longest prompt that it will be asked.

    Raises:
        InputError: there is no such model, it has no chat template, or its context window has no
            room for the prompt and `max_tokens`.
    """
    if backend.is_server:
        return None
    local_config(model, "model")
    config, tokenizer = read_checkpoint(model, "model")
    if not tokenizer.chat_template:
        raise InputError(
            f"{model}: chat template: found none; expected one in its tokenizer (chat_template.jinja)"
        )
    tokens = len(tokenizer(_render(tokenizer, [{"role": "user", "content": longest}]))["input_ids"])
    check_room(model, context_window(config), tokens, max_tokens)
    return tokenizer


def check_room(model: str, window: int | None, tokens: int, max_tokens: int) -> None:
    """That a model's context window has room for a prompt of `tokens` and an answer.

    Raises:
        InputError: it has not.
    """
    if window is not None and tokens + max_tokens > window:
        raise InputError(
            f"{model}: found a context window of {window} tokens; expected room for a prompt of "
            f"{tokens} and an answer of {max_tokens}"
        )


def _render(tokenizer: Any, messages: Sequence[Mapping[str, str]], opening: bool = True) -> str:
    """Messages as text, as lm-eval's local models render them."""
    return str(
        tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=opening,
            continue_final_message=not opening,
        )
    )


class ModelOnDemand:
    """Stands for an lm-eval model, which is loaded when it has to compute an answer.

    So a model whose answers are all known is never loaded. A batch that exhausts memory is tried
    again at half its size.

    Args:
        tokenizer: the model's, where it alone says how messages are rendered.
    """

    rank, world_size = 0, 1  # what lm-eval asks before there is anything to compute

    def __init__(self, model: str, backend: Backend, tokenizer: Any | None) -> None:
        self.model, self.backend, self.tokenizer_name = model, backend, model
        self.computed = 0
        """Requests that were not known."""
        self._tokenizer = tokenizer if not _TEMPLATE_ARGUMENTS & set(backend.arguments) else None
        self._hook: Any = None
        self._lm: Any = None

    def set_cache_hook(self, hook: Any) -> None:
        self._hook = hook

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> Any:
        from jinja2 import TemplateError

        if self._tokenizer is not None:
            try:
                return _render(self._tokenizer, chat_history, add_generation_prompt)
            except TemplateError:  # a system message, say; lm-eval's models know what to do
                pass
        return self._loaded().apply_chat_template(chat_history, add_generation_prompt)

    def generate_until(self, requests: list[Any]) -> list[str]:
        return self._answer("generate_until", requests)

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        return self._answer("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[Any]:
        return self._answer("loglikelihood_rolling", requests)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._loaded(), name)

    def unload(self) -> None:
        """Let the model leave memory."""
        import torch

        self._lm = self._hook = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _loaded(self) -> Any:
        if self._lm is None:
            self._lm = self.backend.load(self.model)
            if self._hook is not None:
                self._lm.set_cache_hook(self._hook)
        return self._lm

    def _answer(self, kind: str, requests: list[Any]) -> list[Any]:
        from accelerate.utils.memory import should_reduce_batch_size

        lm = self._loaded()
        while True:
            try:
                answers: list[Any] = getattr(lm, kind)(
                    requests, disable_tqdm=not sys.stderr.isatty()
                )
                break
            except RuntimeError as error:
                size = getattr(lm, "batch_size_per_gpu", None)
                if not isinstance(size, int) or size < 2 or not should_reduce_batch_size(error):
                    raise
            # Outside the handler, whose traceback keeps the batch's tensors alive.
            lm.batch_size_per_gpu = size // 2
        self.computed += len(requests)
        return answers


@contextmanager
def open_model(
    model: str, backend: Backend, tokenizer: Any | None, cache: Path
) -> Iterator[tuple[Any, ModelOnDemand]]:
    """A model whose answers are kept in `cache`, as lm-eval sees it, and what computes for it.

    It leaves memory at the end.
    """
    from lm_eval.api.model import CachingLM

    on_demand = ModelOnDemand(model, backend, tokenizer)
    lm = CachingLM(on_demand, str(cache / f"{generation_fingerprint(model, backend)}.sqlite"))
    try:
        yield lm, on_demand
    finally:
        lm.dbdict.close()
        on_demand.unload()


def generation_fingerprint(model: str, backend: Backend) -> str:
    """What an answer depends on beside the prompt and the generation settings."""
    parts = [
        model_fingerprint(model),
        None if backend.is_server else commit(model, backend.arguments.get("revision", "main")),
        backend.name,
        backend.dtype,
        backend.device.split(":")[0],
        sorted(backend.arguments.items()),
        *(version(package) for package in ("lm_eval", "transformers")),
    ]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def generate(lm: Any, prompts: Sequence[str], *, max_tokens: int) -> list[str]:
    """Greedy answers to one-turn prompts, through the chat template, in order."""
    from lm_eval.api.instance import Instance

    settings = {"until": [], "max_gen_toks": max_tokens, "do_sample": False}
    requests = [
        Instance(
            request_type="generate_until",
            doc={},
            arguments=(lm.apply_chat_template([{"role": "user", "content": prompt}]), settings),
            idx=0,
        )
        for prompt in prompts
    ]
    return [str(answer) for answer in lm.generate_until(requests)] if requests else []
