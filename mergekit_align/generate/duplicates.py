"""Questions that are the same, or nearly: by normalised text, and by MinHash.

MinHash with banding (`rensa`) proposes pairs, and the exact Jaccard similarity of their shingles
decides, so that a pair below the threshold is never taken for one. A pair at the threshold is proposed
with a probability of at least 0.9998, at the default 0.7 of all but 3 in 10^8. Shingles are runs of
five characters, which serves languages with and without spaces.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from functools import lru_cache

from rensa import RMinHash, RMinHashLSH

SHINGLE = 5
_SEED = 1


class _Characters(dict[int, str]):
    """What each character becomes: letters, marks and digits stay."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        stays = character.isalnum() or unicodedata.category(character)[0] == "M"
        self[code] = character if stays else " "
        return self[code]


_CHARACTERS = _Characters()


@lru_cache(maxsize=8)  # a question is compared with evaluation sets, then with others, then kept
def normalised(text: str) -> str:
    """Text without case, compatibility forms, punctuation and runs of white space."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.translate(_CHARACTERS).split())


def shingles(text: str) -> set[str]:
    """The runs of five characters of a normalised text; of a shorter one, itself."""
    return {text[start : start + SHINGLE] for start in range(max(1, len(text) - SHINGLE + 1))}


def similarity(first: str, second: str) -> float:
    """Jaccard similarity of two normalised texts' shingles."""
    a, b = shingles(first), shingles(second)
    return len(a & b) / len(a | b)


class Seen:
    """Texts, and whether another one is nearly one of them.

    Args:
        threshold: similarity from which on two texts are one; 1 takes identical ones alone, after
            normalisation.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._known: set[str] = set()
        self._texts: list[str] = []
        # (1 - t^rows)^bands is the chance to overlook a pair at the threshold t.
        self._bands, rows = (64, 4) if threshold >= 0.6 else (85, 3)
        self._permutations = self._bands * rows
        self._index = RMinHashLSH(
            threshold=threshold, num_perm=self._permutations, num_bands=self._bands
        )

    def add(self, text: str) -> None:
        """Remember a text."""
        text = normalised(text)
        if not text or text in self._known:
            return
        self._known.add(text)
        if self._threshold < 1:
            self._index.insert(len(self._texts), self._hash(text))
        self._texts.append(text)

    def add_all(self, texts: Iterable[str]) -> None:
        """Remember several."""
        for text in texts:
            self.add(text)

    def knows(self, text: str) -> bool:
        """Whether a text, normalised, is one that is remembered, or nearly is."""
        text = normalised(text)
        if text in self._known:
            return True
        if self._threshold == 1 or not text:
            return False
        candidates = (self._texts[index] for index in sorted(self._index.query(self._hash(text))))
        return any(similarity(text, each) >= self._threshold for each in candidates)

    def _hash(self, text: str) -> RMinHash:
        return _hashed(text, self._permutations)


@lru_cache(maxsize=8)
def _hashed(text: str, permutations: int) -> RMinHash:
    hashed = RMinHash(num_perm=permutations, seed=_SEED)
    hashed.update(list(shingles(text)))
    return hashed
