"""Which language a text is in: `py3langid`, an optional dependency."""

from __future__ import annotations

from functools import cache
from typing import Any

from mergekit_align.errors import InputError

NAMES = {
    **{"ar": "Arabic", "bg": "Bulgarian", "ca": "Catalan", "cs": "Czech", "da": "Danish"},
    **{"de": "German", "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian"},
    **{"fa": "Persian", "fi": "Finnish", "fr": "French", "he": "Hebrew", "hi": "Hindi"},
    **{"hr": "Croatian", "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese"},
    **{"ko": "Korean", "lt": "Lithuanian", "lv": "Latvian", "nl": "Dutch", "no": "Norwegian"},
    **{"pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sk": "Slovak"},
    **{"sl": "Slovenian", "sv": "Swedish", "sw": "Swahili", "th": "Thai", "tr": "Turkish"},
    **{"uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese"},
}
_CLEARLY = 2.0
"""How much likelier another language must be for a text to be in it: short texts tell little."""


def check_language(code: str, where: str) -> None:
    """That texts can be asked for in a language, and told.

    Raises:
        InputError: we do not know it, or the package that tells it is missing.
    """
    if code not in NAMES:
        raise InputError(f"{where}: found {code!r}; expected one of {', '.join(sorted(NAMES))}")
    try:
        _identifier()
    except ImportError as error:
        raise InputError(
            f"{where}: found no py3langid, which tells languages; expected it (`pip install py3langid`)"
        ) from error


def is_in(text: str, code: str) -> bool:
    """Whether a text may be in a language: no other one is clearly likelier."""
    ranked = dict(_identifier().rank(text))
    return bool(max(ranked.values()) <= _CLEARLY * ranked[code])


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(list(NAMES))
    return identifier
