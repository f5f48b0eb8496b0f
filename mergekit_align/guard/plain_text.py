"""Text for a guard's prompt that stays text: it never becomes a control token.

A tokenizer reads `<|eot_id|>` in a response as the token that ends a turn. So a word joiner (U+2060,
invisible) is put into the text of every control token that a content holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORD_JOINER = "\u2060"


class PlainText:
    """What one tokenizer makes of texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def ids(self, text: str) -> list[int]:
        """Token ids of a prompt's whole text, control tokens among them."""
        return self.all_ids([text])[0]

    def all_ids(self, texts: list[str]) -> list[list[int]]:
        """The same of many texts."""
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)
        ids: list[list[int]] = encoded.input_ids
        return ids

    def shortened(self, text: str, excess: int) -> str:
        """`text` without its last `excess` tokens, and at least a character shorter."""
        encoded = self.tokenizer(
            text, add_special_tokens=False, verbose=False, return_offsets_mapping=True
        )
        kept = len(encoded.input_ids) - excess
        end = encoded.offset_mapping[kept - 1][1] if kept > 0 else 0
        return text[: min(end, len(text) - 1)]

    def defused(self, content: str) -> str:
        """`content` with a word joiner in the text of every control token that it holds."""
        for text in self._control_texts:
            content = content.replace(text, text[:1] + _WORD_JOINER + text[1:])
        # At the ends as well, where a template's text could complete a control token's.
        return f"{_WORD_JOINER}{content.strip(_WORD_JOINER)}{_WORD_JOINER}"

    def control_tokens(self, ids: Iterable[int]) -> tuple[int, ...]:
        """Those of `ids` that are control tokens."""
        return tuple(token for token in ids if token in self._control_ids)

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder
        special = {token for token, value in added.items() if value.special}
        return frozenset(special | set(self.tokenizer.all_special_ids))

    @cached_property
    def _control_texts(self) -> list[str]:
        texts = self.tokenizer.convert_ids_to_tokens(sorted(self._control_ids))
        return sorted((text for text in texts if text), key=len, reverse=True)


def encodable(text: str) -> str:
    """`text` with U+FFFD for halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
