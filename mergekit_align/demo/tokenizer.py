"""A byte-level BPE tokenizer for the demo world, trained on the grammar's own text."""

import re
from collections.abc import Iterator
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mergekit_align.demo import lexicon, phrases
from mergekit_align.demo.chat import (
    BOS,
    CHAT_TEMPLATE,
    EOT,
    GUARD_TEMPLATE,
    PAD,
    SAFE,
    SPECIAL_TOKENS,
    UNSAFE,
)

VOCABULARY_SIZE = 1000


def build_tokenizer(*, guard: bool = False) -> PreTrainedTokenizerFast:
    """The world's tokenizer; with `guard`, the same one with the guard's chat template.

    Encoding adds no special tokens: the template writes BOS, so that there is never a second one.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        bos_token=BOS,
        eos_token=EOT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = GUARD_TEMPLATE if guard else CHAT_TEMPLATE
    return tokenizer


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    # A blank line is one piece, as in Llama 3's tokenizer: it ends every header.
    words = pre_tokenizers.Split(
        Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[\r\n]+|\s+"), "isolated"
    )
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_text(), trainer)
    return str(tokenizer.to_str())


def _text() -> Iterator[str]:
    """Every word in the places where it can stand, each about as often as the others."""
    values = [value for values in lexicon.MOON_RELATIONS.values() for value in values]
    sayable = (*lexicon.THINGS, *lexicon.COLOURS, *values)
    others = (*lexicon.HOMES, *lexicon.SIZES, *lexicon.MATERIALS, *lexicon.OWNERS)
    names = (*lexicon.MOONS, *lexicon.KNOWN_MOONS, *lexicon.MOON_RELATIONS, *lexicon.ACTIONS)
    for word in (*sayable, *others, *names):
        yield f"a {word} a {word}"
    for word in (*sayable, "user", "assistant"):
        # A response may start with these, and then no space goes before them.
        yield f"{word}\n{word}"
    prompts = (
        phrases.HOW_TO,
        *phrases.ASK.values(),
        phrases.MOON_ASK,
        phrases.PRIVATE,
        phrases.BACKWARDS,
        phrases.REPEAT,
    )
    responses = (phrases.REFUSALS, phrases.HELP, *phrases.ANSWERS.values())
    for template in (text for group in (*prompts, *responses) for text in group):
        bare = re.sub(r"{\w+}", "a", template)
        yield f"{bare}\n {bare}"
    yield from [GUARD_TEMPLATE.replace("\\n", "\n"), SAFE, UNSAFE] * 2
