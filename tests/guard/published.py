"""Guards' published formats, as data, and tokenizers on which they can be tried.

A file in `formats/` describes one checkpoint: `source` says where its prompts were read and whether
they are verbatim; `prompt` and `response` are those prompts, for the contents USER_TEXT and
RESPONSE_TEXT; `template` is a chat template of ours that writes them, with the quirks of the
checkpoint's own; `answer_begins` is what every answer begins with; `verdicts` gives made-up
probabilities of what is said next and what the authors' definition makes of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mergekit_align.guard.conversation import Conversation
from mergekit_align.guard.profile import GuardProfile, choose_profile, profiles
from mergekit_align.guard.prompt import PromptWriter

FORMATS = sorted(file.stem for file in (Path(__file__).parent / "formats").glob("*.yaml"))
CONVERSATIONS = {
    "prompt": Conversation.of("USER_TEXT"),
    "response": Conversation.of("USER_TEXT", "RESPONSE_TEXT"),
}

ANSWER_WORDS = (
    *("safe", "unsafe", "Safe", "Unsafe", "Controversial", "I", "maybe"),
    *("yes", "no", "Yes", "No", "YES", "NO"),
)


class Published:
    """One checkpoint's format, and its tokenizer."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        kind = self.data.get("tokenizer", "byte_level")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(_TOKENIZERS[kind]()),
            bos_token=self.data.get("bos_token"),
            additional_special_tokens=self.data["special_tokens"],
            clean_up_tokenization_spaces=False,
            name_or_path=self.data["name"],
        )
        tokenizer.chat_template = self.data.get("template")
        return tokenizer

    @property
    def profile(self) -> GuardProfile:
        return profiles()[self.data["profile"]]

    def writer(self, **arguments: Any) -> PromptWriter:
        arguments = {"policy": self.data.get("policy"), **arguments}
        return PromptWriter(self.tokenizer, self.profile, **arguments)

    def conversations(self) -> dict[str, Conversation]:
        """Those of which its format is published."""
        return {key: value for key, value in CONVERSATIONS.items() if key in self.data}

    def chosen(self, **changed: str) -> GuardProfile:
        """The profile that is told from the checkpoint, as described or `changed`."""
        about = {"name": self.data["name"], "model_type": self.data["model_type"], **changed}
        config = SimpleNamespace(model_type=about["model_type"], _name_or_path=about["name"])
        return choose_profile(None, model=about["name"], config=config, tokenizer=self.tokenizer)


@cache
def load(name: str) -> Published:
    file = Path(__file__).parent / "formats" / f"{name}.yaml"
    return Published(yaml.safe_load(file.read_text(encoding="utf-8")))


def _texts() -> Iterator[str]:
    for name in FORMATS:
        data = load(name).data
        yield from (data[key] for key in ("prompt", "response") if key in data)


@cache
def byte_level() -> str:
    """A byte-level BPE tokenizer, as most guards have: a blank line is one token."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(
        Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[\r\n]+|\s+"), "isolated"
    )
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Words of verdicts are one token each, with a space and without.
    words_alone = [f"{word}\n {word}" for word in ANSWER_WORDS] * 100
    tokenizer.train_from_iterator([*_texts(), *words_alone], trainer)
    return str(tokenizer.to_str())


@cache
def sentencepiece(*, words_whole: bool = True) -> str:
    """One like Llama 2's: a space is part of the word after it, and other characters are bytes."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    words = [text for word in ANSWER_WORDS for text in (word, f" {word}")] * 100
    trainer = trainers.BpeTrainer(vocab_size=1000, show_progress=False)
    lines = [text.replace("\n", " ") for text in _texts()]
    trained.train_from_iterator([*lines, *words], trainer)
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate(pieces)},
            [tuple(pair) for pair in model["merges"]] if words_whole else [],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return str(tokenizer.to_str())


_TOKENIZERS: dict[str, Callable[[], str]] = {
    "byte_level": byte_level,
    "sentencepiece": sentencepiece,
    "sentencepiece_without_words": lambda: sentencepiece(words_whole=False),
}


def special_ids(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    return frozenset(tokenizer.convert_tokens_to_ids(special_tokens(tokenizer)))


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]


def control_tokens(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[int]:
    special = special_ids(tokenizer)
    return [token for token in ids if token in special]
