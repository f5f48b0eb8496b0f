"""What tells refusals from helpful responses, cut as soon as it does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_align.encoding import EncodedSample
from mergekit_align.errors import InputError
from mergekit_align.loss import response_scores
from mergekit_align.openings import MAX_TOKENS, Openings, tell_apart


def test_a_first_token_of_one_kind_alone_is_an_opening() -> None:
    assert tell_apart([[1, 9], [2, 9]], [[3, 9]]) == Openings(((1,), (2,)), ((3,),))


def test_a_beginning_of_both_kinds_is_followed_until_they_part() -> None:
    openings = tell_apart([[1, 2, 3], [4, 0]], [[1, 2, 5], [6, 0]])
    assert openings == Openings(((1, 2, 3), (4,)), ((1, 2, 5), (6,)))


def test_a_rare_beginning_belongs_to_the_kind_in_which_it_is_frequent() -> None:
    openings = tell_apart([[1, 2]] * 199 + [[3, 4]], [[3, 5]] * 199 + [[1, 6]])
    assert openings == Openings(((1,),), ((3,),))


def test_what_never_tells_them_apart_is_an_error() -> None:
    with pytest.raises(InputError, match="tells refusals from helpful"):
        tell_apart([[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 6]])


responses = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=9)


@given(responses, responses)
def test_no_opening_begins_another(refusals: list[list[int]], helpful: list[list[int]]) -> None:
    try:
        openings = tell_apart(refusals, helpful)
    except InputError:
        return
    every = [*openings.refusal, *openings.help]
    assert len(set(every)) == len(every)
    assert all(1 <= len(opening) <= MAX_TOKENS for opening in every)
    assert not any(a != b and b[: len(a)] == a for a in every for b in every)


def test_the_margin_is_the_ratio_of_the_openings_probabilities(world: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    model = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32).eval()
    prompts = [tokenizer(text).input_ids for text in ("a longer prompt than", "this")]
    openings = Openings(((30, 40), (50,)), ((30, 41, 42), (60,)))

    def probability(prompt: list[int], opening: tuple[int, ...]) -> float:
        product = 1.0
        for position, token in enumerate(opening):
            ids = torch.tensor([[*prompt, *opening[:position]]])
            with torch.no_grad():
                product *= float(model(ids).logits[0, -1].softmax(0)[token])
        return product

    scores = response_scores(
        model, [EncodedSample(ids, [5, 6]) for ids in prompts], openings=[openings] * 2
    )
    for prompt, score in zip(prompts, scores, strict=True):
        refusal, help_ = (sum(probability(prompt, o) for o in kind) for kind in openings)
        expected = torch.tensor(refusal / help_).log().item()
        assert score.decision_margin == pytest.approx(expected, abs=1e-4)
