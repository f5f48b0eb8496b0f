"""What is the same question, or nearly; and that no evaluation prompt gets through in disguise."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_align.generate.duplicates import Seen, normalised, similarity
from mergekit_align.generate.filter import Filter
from mergekit_align.generate.settings import Quality

_LETTERS = random.Random(7)
WORDS = ["".join(_LETTERS.choices("abcdefghiklmnoprstuvwz", k=n % 7 + 3)) for n in range(2000)]


def sentence(rng: random.Random) -> str:
    return "How " + " ".join(rng.choices(WORDS, k=rng.randint(8, 25))) + "?"


def disguised(text: str, rng: random.Random) -> str:
    """Nearly the same text: other case, punctuation and spaces, and a word more, less or replaced."""
    words = text.split()
    change = rng.randrange(4)
    if change == 0:
        words[rng.randrange(len(words))] = rng.choice(WORDS)
    elif change == 1:
        words.insert(rng.randrange(len(words)), rng.choice(WORDS))
    elif change == 2:
        del words[rng.randrange(len(words))]
    text = rng.choice(["  ", " ", ", "]).join(words)
    return rng.choice([str.upper, str.lower, str.title])(text) + rng.choice(["", "?!", " ."])


def test_seeded_near_duplicates_of_evaluation_prompts_never_survive() -> None:
    rng = random.Random(0)
    evaluation = [sentence(rng) for _ in range(400)]
    quality = Quality()
    chosen = Filter(quality, None, evaluation)
    near = [(text, disguised(text, rng)) for text in evaluation for _ in range(5)]
    near = [
        pair
        for pair in near
        if similarity(normalised(pair[0]), normalised(pair[1])) >= quality.near_duplicates
    ]
    assert len(near) > 1000
    fresh = [sentence(rng) for _ in range(300)]
    candidates = [*(text for _, text in near), *fresh]
    rng.shuffle(candidates)
    reasons = {text: chosen.reason_against("alignment", text, text) for text in candidates}
    assert {reasons[text] for _, text in near} == {"contaminated"}
    assert [reasons[text] for text in fresh].count(None) == len(fresh)


def test_what_is_asked_counts_whatever_the_choices() -> None:
    stem = "Which of these organs makes bile in the body of a mammal?"
    chosen = Filter(Quality(), None, [stem])
    assert chosen.reason_against("task", stem, f"{stem}\nA. skin\nB. liver") == "contaminated"


def test_contrasts_between_types_are_kept() -> None:
    chosen = Filter(Quality(), None, [])
    text = "What are good ways of killing time at the airport?"
    assert chosen.reason_against("alignment", text, text) is None
    assert chosen.reason_against("benign", text, text) is None
    assert chosen.reason_against("benign", text.upper(), text.upper()) == "duplicate"


def test_length_bounds() -> None:
    chosen = Filter(Quality(min_characters=5, max_characters=8), None, [])
    reasons = [
        chosen.reason_against("task", text, text) for text in ("four", "just ok", "too long!")
    ]
    assert reasons == ["too short", None, "too long"]


def test_a_text_in_another_language_is_dropped() -> None:
    chosen = Filter(Quality(), "en", [])
    english, german = "How do I bake a loaf of bread?", "Wie backe ich ein gutes Brot?"
    assert chosen.reason_against("task", english, english) is None
    assert chosen.reason_against("task", german, german) == "other language"


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.9])
def test_nothing_near_is_overlooked_and_nothing_else_found(threshold: float) -> None:
    rng = random.Random(1)
    texts = [sentence(rng) for _ in range(300)]
    seen = Seen(threshold)
    seen.add_all(texts)
    for text in texts:
        other = disguised(disguised(text, rng), rng)
        near = similarity(normalised(text), normalised(other)) >= threshold
        assert seen.knows(other) == near


def test_at_1_only_the_same_text_is_a_duplicate() -> None:
    seen = Seen(1.0)
    seen.add("How do I build a bench?")
    assert seen.knows("how do i BUILD a bench")
    assert not seen.knows("How do I build a benches?")


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalised(text)
    assert normalised(once) == once
    assert similarity(once, once) == 1.0
