"""Prompts and responses as token ids, split where the response begins.

One convention everywhere, lm-eval's for chat models: a prompt is rendered by the tokenizer's chat
template, the beginning-of-sequence token is added only where the tokenizer adds one and the template
has not, and a response ends with its turn's end token. Prompt and response are tokenized as one text,
as a model was trained on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from mergekit_align.errors import InputError
from mergekit_align.token_ids import common_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mergekit_align.samples import Sample

_PROBE = "PROBE"


class EncodedSample(NamedTuple):
    """Token ids of one sample; a model predicts `response_ids` given `prompt_ids`."""

    prompt_ids: list[int]
    response_ids: list[int]

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of the prompt and of the response."""
        return len(self.prompt_ids), len(self.response_ids)


REMEMBERED = 2**16
"""Encodings that an encoder keeps: a search asks for the same ones at every evaluation."""


class ResponseEncoder:
    """Encodes prompts and responses for one tokenizer, each once.

    Args:
        tokenizer: of the model that will read the ids.
        max_length: the model's context window in tokens; `None` for no limit.
        add_bos: `True` or `False` overrides what the tokenizer does by itself.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        add_bos: bool | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        bos = tokenizer.bos_token_id
        if add_bos is None:
            add_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
        self._bos_ids: list[int] = [bos] if add_bos and bos is not None else []
        self.chat_turn_end = _chat_turn_end(tokenizer)
        self.plain_turn_end: str = tokenizer.eos_token or ""
        self._encode = lru_cache(REMEMBERED)(self._encode_anew)

    def render(self, prompt: str) -> str:
        """`prompt` as a user's turn in the tokenizer's chat template, ready for the answer.

        Raises:
            InputError: the tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise InputError(
                f"{self.tokenizer.name_or_path}: chat template: found none; expected a tokenizer "
                "with one"
            )
        turns = [{"role": "user", "content": prompt}]
        return str(
            self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        )

    def encode_samples(self, samples: Iterable[Sample]) -> list[EncodedSample]:
        """Ids of chat-templated samples.

        Raises:
            InputError: the tokenizer has no chat template, or a response alone does not fit.
        """
        return [
            self.encode(self.render(each.prompt), each.response, templated=True) for each in samples
        ]

    def encode(self, context: str, response: str, *, templated: bool) -> EncodedSample:
        """Ids of `response` and its end token after `context`, a text rendered already.

        What exceeds the context window is cut from the left of the prompt, the beginning-of-sequence
        token aside.

        Raises:
            InputError: the response alone does not fit into the context window.
        """
        return self._encode(context, response, templated)

    def _encode_anew(self, context: str, response: str, templated: bool) -> EncodedSample:
        end = self.chat_turn_end if templated else self.plain_turn_end
        prompt_ids = self._ids(context)
        whole_ids = self._ids(context + response + end)
        # A token that joins the prompt's last character to the response's first is the response's.
        shared = common_length([prompt_ids, whole_ids])
        prompt_ids, response_ids = whole_ids[:shared], whole_ids[shared:]
        if not response_ids:
            raise InputError("response '': found no token to predict and no end token")
        has_bos = prompt_ids[:1] == [self.tokenizer.bos_token_id]
        if not context.startswith(self.tokenizer.bos_token or "\0"):
            prompt_ids = self._bos_ids + prompt_ids
            has_bos = has_bos or bool(self._bos_ids)
        if not prompt_ids:
            prompt_ids = [self._first_id(response)]
        if self.max_length is not None and len(prompt_ids) + len(response_ids) > self.max_length:
            prompt_ids = self._cut(prompt_ids, response_ids, has_bos, response)
        return EncodedSample(prompt_ids, response_ids)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def _first_id(self, response: str) -> int:
        """Something must come before the first predicted token, as lm-eval has it for no context."""
        for token_id in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        raise InputError(
            f"response {response[:60]!r}: found an empty prompt and no BOS or EOS token"
        )

    def _cut(
        self, prompt_ids: list[int], response_ids: list[int], has_bos: bool, response: str
    ) -> list[int]:
        assert self.max_length is not None
        kept_start = prompt_ids[:1] if has_bos else []
        room = self.max_length - len(response_ids) - len(kept_start)
        if room < 0 or (room == 0 and not kept_start):
            raise InputError(
                f"response {response[:60]!r}: found {len(response_ids)} tokens; expected fewer than "
                f"the context window's {self.max_length}"
            )
        return kept_start + (prompt_ids[-room:] if room else [])


def _chat_turn_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes after a response, up to the first special token."""
    if not tokenizer.chat_template:
        return str(tokenizer.eos_token or "")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
    rendered = str(tokenizer.apply_chat_template(turns, tokenize=False))
    suffix = rendered.rpartition(_PROBE)[2]
    ends = [
        suffix.find(token) + len(token) for token in _special_tokens(tokenizer) if token in suffix
    ]
    return suffix[: min(ends)] if ends else str(tokenizer.eos_token or "")


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> Iterable[str]:
    added = tokenizer.added_tokens_decoder.values()
    return {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
