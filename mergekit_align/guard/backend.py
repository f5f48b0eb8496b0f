"""A guard that answers through lm-eval: a server (`local-completions`), vLLM or any other model.

A backend is asked one thing, the log-likelihood of token ids after token ids. So prompts arrive as
they were written, without being tokenized again, and a verdict is defined as for a model in this
process. It cannot write after token ids: where a guard in this process writes the list of what is
violated, a backend names the one category that is likeliest, at the cost of a request for each.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from tqdm.asyncio import tqdm_asyncio

from mergekit_align.checkpoints import context_window
from mergekit_align.devices import default_device, default_dtype
from mergekit_align.errors import InputError, closest
from mergekit_align.guard.scorer import Score, Scorer
from mergekit_align.guard.verdict import Logprobs, VerdictTree
from mergekit_align.token_ids import TokenIds, common_length

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM

    from mergekit_align.guard.prompt import Frame
    from mergekit_align.guard.settings import GuardSettings

REQUEST_PROMPTS = 16
"""Prompts that a request to a server holds."""
REQUEST_SECONDS = 120
"""How long a server may take to answer one, which lm-eval sends three times at most."""


class BackendScorer(Scorer):
    """Any lm-eval model that tokenizes here and answers log-likelihoods of token ids.

    Args:
        name: what lm-eval calls it.

    Raises:
        InputError: the backend does not tokenize here, is sent text, or has no server's address.
    """

    def __init__(self, lm: TemplateLM, name: str) -> None:
        from lm_eval.models.api_models import TemplateAPI

        self._where = f"guard backend {name}"
        self._is_server = isinstance(lm, TemplateAPI)
        tokenizer = getattr(lm, "tokenizer", None)
        if not callable(tokenizer) or not hasattr(lm, "_loglikelihood_tokens"):
            raise InputError(
                f"{self._where}: found no tokenizer; expected a model that tokenizes here "
                "and answers log-likelihoods"
            )
        if self._is_server and not lm.tokenized_requests:
            raise InputError(
                f"{self._where}: found that it sends text; expected one that sends token ids, where "
                "a response cannot pass for a part of the guard's prompt"
            )
        if self._is_server and not lm.base_url:
            raise InputError(f"{self._where}: base_url: found none; expected a server's address")
        self.lm = lm
        self.tokenizer = tokenizer
        # lm-eval has taken one off a server's already.
        self.max_length = lm.max_length if self._is_server else lm.max_length - 1

    def scores(
        self, prompts: Sequence[Sequence[int]], tree: VerdictTree, *, preamble: TokenIds
    ) -> list[Score]:
        wanted = [(place, token) for place, tokens in tree.branches.items() for token in tokens]
        answers = iter(
            self._loglikelihoods(
                [([*prompt, *place], [token]) for prompt in prompts for place, token in wanted]
            )
        )
        scores = []
        for _ in prompts:
            logprobs: dict[TokenIds, dict[int, float]] = {}
            for place, token in wanted:
                logprobs.setdefault(place, {})[token] = next(answers)
            self._check(logprobs)
            scores.append(Score(logprobs, "found other tokens than a verdict's"))
        return scores

    def categories(
        self, prompts: Sequence[Sequence[int]], frame: Frame, *, max_tokens: int
    ) -> list[tuple[str, ...]]:
        """The likeliest category of each prompt, alone."""
        codes = self._code_ids(frame)
        queries = [(list(prompt), list(ids)) for prompt in prompts for ids in codes.values()]
        answers = iter(self._loglikelihoods(queries))
        return [(likeliest_code(codes, [next(answers) for _ in codes]),) for _ in prompts]

    def texts(
        self, prompts: Sequence[Sequence[int]], *, preamble: TokenIds, max_tokens: int
    ) -> list[str]:
        raise _writes_nothing(self._where)

    def _loglikelihoods(self, queries: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        requests = [(("", ""), context, continuation) for context, continuation in queries]
        try:
            with _quiet(), _without_bars():
                answers = self.lm._loglikelihood_tokens(requests, disable_tqdm=True)
        except Exception as error:  # a server's client raises what it likes
            if not self._is_server:
                raise
            raise InputError(
                f"{self._where}: found no answer from {self.lm.base_url} ({_reason(error)}); "
                "expected log-likelihoods"
            ) from error
        return [float(logprob) for logprob, _ in answers]

    def _check(self, logprobs: Logprobs) -> None:
        """A server that ignores `echo` answers with nothing, whose log-probability is 0."""
        for branch in logprobs.values():
            total = sum(math.exp(value) for value in branch.values())
            if total > 1.01:
                raise InputError(
                    f"{self._where}: found probabilities whose sum is {total:.2f}; expected those "
                    "of the prompt's own tokens (`echo` together with `logprobs`)"
                )

    def _code_ids(self, frame: Frame) -> dict[str, TokenIds]:
        """What follows a prompt's ids where each code comes first, as the tokenizer splits it there."""
        before = self.tokenizer.decode(frame.category_start)
        separator = "" if before[-1:].isspace() else " "

        def tokenize(text: str) -> list[int]:
            ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
            return ids

        alone = tokenize(before)
        found = {}
        for code in frame.codes:
            together = tokenize(before + separator + code)
            shared = common_length([alone, together])
            kept = len(frame.category_start) - (len(alone) - shared)
            found[code] = (*frame.category_start[:kept], *together[shared:])
        return found


def likeliest_code(codes: Mapping[str, TokenIds], logprobs: Sequence[float]) -> str:
    """The code that is likeliest to be written whole.

    Args:
        codes: token ids of each.
        logprobs: log-probabilities of those; what begins a longer code (S1, S10) includes it.
    """
    alone: dict[str, float] = {}
    logprob = dict(zip(codes, logprobs, strict=True))
    for code in sorted(codes, key=lambda code: len(codes[code]), reverse=True):
        ids = codes[code]
        longer = [other for other in alone if codes[other][: len(ids)] == ids]
        alone[code] = math.exp(logprob[code]) - sum(alone[other] for other in longer)
    return max(codes, key=alone.__getitem__)


def load_backend(settings: GuardSettings) -> BackendScorer:
    """The backend of these settings, which must name one.

    Raises:
        InputError: lm-eval has no such model, or it cannot be had or asked with these arguments.
    """
    from lm_eval.api.registry import get_model, model_registry

    name = settings.backend
    assert name is not None
    where = f"guard backend {name}"
    if settings.mode == "generate":
        raise _writes_nothing(where)
    try:
        kind = get_model(name)
    except (KeyError, ValueError) as error:
        raise InputError(
            f"guard backend: found {name!r}; expected a model of lm-eval's"
            f"{closest(name, model_registry.keys())}"
        ) from error
    except ImportError as error:
        raise InputError(f"{where}: found that it cannot be imported ({error})") from error
    arguments = {**_default_arguments(kind, settings), **settings.backend_args}
    try:
        with _quiet():
            lm = kind(**arguments)
    except (AssertionError, ImportError, OSError, TypeError, ValueError) as error:
        raise InputError(f"{where}: found that it does not start ({_reason(error)})") from error
    return BackendScorer(lm, name)


def _default_arguments(kind: type[TemplateLM], settings: GuardSettings) -> dict[str, Any]:
    from lm_eval.models.api_models import TemplateAPI
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoConfig

    if issubclass(kind, TemplateAPI):
        window = context_window(AutoConfig.from_pretrained(settings.model))
        return {
            "model": settings.model,
            "tokenizer": settings.model,
            # Otherwise lm-eval asks the server for one.
            "tokenizer_backend": "huggingface",
            "batch_size": settings.batch_size or REQUEST_PROMPTS,
            "timeout": REQUEST_SECONDS,
            **({"max_length": window} if window else {}),
        }
    arguments: dict[str, Any] = {"pretrained": settings.model}
    if issubclass(kind, HFLM):
        arguments["device"] = settings.device or default_device()
        arguments["dtype"] = settings.dtype or default_dtype(arguments["device"])
    elif settings.dtype:
        arguments["dtype"] = settings.dtype
    if settings.batch_size:
        arguments["batch_size"] = settings.batch_size
    return arguments


def _writes_nothing(where: str) -> InputError:
    return InputError(
        f"{where}: found mode 'generate'; expected 'probability', as a backend does not write after "
        "token ids"
    )


def _reason(error: BaseException) -> str:
    """What happened, in one line, and what a server said of it."""
    said = getattr(getattr(error, "response", None), "text", "")
    first, earlier = error, error.__cause__ or error.__context__
    while earlier is not None:
        # Clients wrap what the system told them, at length.
        first = earlier if isinstance(earlier, OSError) else first
        earlier = earlier.__cause__ or earlier.__context__
    text = " ".join(f"{type(first).__name__} {first} {said}".split())
    return text if len(text) <= 200 else text[:197] + "..."


@contextmanager
def _quiet() -> Iterator[None]:
    """Leaves out what lm-eval logs: of a failure, the error says what matters."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Leaves out the progress bars of lm-eval's API models, which heed no `disable_tqdm`."""
    from lm_eval.models import api_models

    bars = {name: vars(api_models).get(name) for name in ("tqdm", "tqdm_asyncio")}
    api_models.tqdm = partial(tqdm, disable=True)
    api_models.tqdm_asyncio = SimpleNamespace(gather=partial(tqdm_asyncio.gather, disable=True))
    try:
        yield
    finally:
        vars(api_models).update(bars)
