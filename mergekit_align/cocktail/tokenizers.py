"""The models' tokenizers: the chat template of the samples, and whether losses by token compare."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from mergekit.merge import _set_chat_template
from mergekit.options import MergeOptions

from mergekit_align.checkpoints import read_checkpoint
from mergekit_align.cocktail.settings import CocktailConfig
from mergekit_align.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Unit = Literal["token", "byte"]


def load_tokenizers(
    config: CocktailConfig, options: MergeOptions
) -> tuple[list[PreTrainedTokenizerBase], Unit]:
    """The tokenizer of every model to be weighed, and what its losses are a mean over.

    The config's `chat_template` replaces the tokenizers' own, as in the merged model. Losses are by
    response token where all tokenizers have one vocabulary. Where they do not, the config must say
    which tokenizer the merge will have (`tokenizer:` or `tokenizer_source:`), and losses are by byte.

    Raises:
        InputError: a tokenizer has no chat template and the config gives none, or the vocabularies
            differ and the config does not choose.
    """
    tokenizers = []
    for model in config.models:
        _, tokenizer = read_checkpoint(
            model.model.path,
            f"{config.path}: models",
            revision=model.model.revision or "main",
            cache_dir=options.transformers_cache,
            trust_remote_code=options.trust_remote_code,
        )
        try:
            _set_chat_template(tokenizer, config.merge, options.trust_remote_code)
        except RuntimeError as error:
            raise InputError.at(
                config.path,
                "chat_template",
                found=repr(config.merge.chat_template),
                expected="auto, one of mergekit's, or a Jinja template",
            ) from error
        if not tokenizer.chat_template:
            raise InputError(
                f"{config.path}: chat_template: found none here nor in the tokenizer of {model}; "
                "expected one: auto, one of mergekit's (chatml, llama3, ...), or a Jinja template"
            )
        tokenizers.append(tokenizer)
    difference = _first_difference(config, tokenizers)
    if difference is None:
        return tokenizers, "token"
    if config.merge.tokenizer is None and config.merge.tokenizer_source is None:
        raise InputError.at(
            config.path,
            "tokenizer",
            found=f"none, but the models' differ: {difference}",
            expected="`tokenizer: {source: ...}`, which then counts for the merged model",
        )
    return tokenizers, "byte"


def _first_difference(config: CocktailConfig, tokenizers: list[Any]) -> str | None:
    """Where the vocabularies differ first."""
    by_id = [{i: token for token, i in each.get_vocab().items()} for each in tokenizers]
    for model, other in zip(config.models[1:], by_id[1:], strict=True):
        for number in sorted(by_id[0].keys() | other.keys()):
            ours, theirs = by_id[0].get(number), other.get(number)
            if ours != theirs:
                return f"token {number} is {ours!r} in {config.models[0]}, {theirs!r} in {model}"
    return None
