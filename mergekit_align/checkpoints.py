"""What can be known of a model without reading its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergekit_align.errors import InputError, one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def read_checkpoint(
    name: str, where: str, **options: Any
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Config and tokenizer of a model.

    Args:
        name: a directory or a hub name.
        where: what names the model, as an error begins: a file and its key, or an option.
        options: as of transformers' `from_pretrained`.

    Raises:
        InputError: there is none that loads.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(name, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise InputError(f"{where}: found no model that loads at {name!r} ({reason})") from error
    return config, tokenizer


def context_window(config: PretrainedConfig) -> int | None:
    """Tokens that a model reads at most; `None` where its config does not say."""
    window: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return window
