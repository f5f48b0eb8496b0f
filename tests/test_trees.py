"""Trees hold every text once, and a model reads in them what it reads in the texts alone."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_output_layer import FAMILIES, OPENINGS, model_of
from transformers import PreTrainedModel

from mergekit_align import trees
from mergekit_align.attention import BLOCK, Blocks
from mergekit_align.demo.models import ARCHITECTURES
from mergekit_align.encoding import EncodedSample
from mergekit_align.loss import ResponseReader, questions, response_scores
from mergekit_align.trees import Budget, Query, TreeBatch, plan_batches

ids = st.lists(st.integers(5, 7), min_size=1, max_size=9)
queries = st.lists(
    st.builds(
        Query,
        st.builds(lambda n, own: [5] * n + own, st.integers(0, 20), ids),
        st.lists(ids, min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=12,
)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return model_of("llama")


def seen_in_blocks(row: Blocks, place: int) -> torch.Tensor:
    """Whether each token of a row is seen by that at `place`, [tokens]."""
    block = int(row.order[place // BLOCK])
    for group in row.groups:
        if block < len(group.blocks):
            break
        block -= len(group.blocks)
    keys = group.keys[block][group.seen[block, place % BLOCK]].tolist()
    assert len(set(keys)) == len(keys)
    seen = torch.zeros(len(row.ends), dtype=torch.bool)
    seen[keys] = True
    return seen


def read_before(batch: TreeBatch, place: int, mask: torch.Tensor) -> list[int]:
    """What a token sees, itself last, by the order of its position; each position once."""
    row, column = divmod(place, batch.ids.shape[1])
    if batch.ends is None:
        assert batch.read[row, : column + 1].all()
        return batch.ids[row, : column + 1].tolist()
    if batch.blocks is not None:
        seen = seen_in_blocks(batch.blocks, place)
    else:
        seen = mask[row, 0, column, len(batch.shared) :]
        assert mask[row, 0, column, : len(batch.shared)].all()
    positions = batch.positions[row, seen].tolist()
    assert positions == list(range(len(batch.shared), len(batch.shared) + len(positions)))
    assert seen[column]
    return [*batch.shared, *batch.ids[row, seen].tolist()]


@given(
    queries,
    st.integers(1, 200),
    st.sampled_from(["blocks", "rows", "texts"]),
    st.booleans(),
    st.integers(1, 3),
)
def test_every_token_is_asked_for_after_all_that_is_before_it(
    llama: PreTrainedModel, asked: list[Query], tokens: int, layout: str, padded: bool, at_once: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trees, "_SIZES", 1)
        patch.setattr(trees, "LEAST_AT_ONCE", 10)
        patch.setattr(trees, "TREE_TOKENS", 30)
        patch.setattr(trees, "reads_blocks", lambda _: layout == "blocks")
        if layout == "texts":
            patch.setattr(trees, "reads_trees", lambda *_: False)
        batches = list(plan_batches(llama, asked, Budget(tokens), padded=padded, at_once=at_once))
    assert sorted(n for batch in batches for n in batch.queries) == list(range(len(asked)))
    for batch in batches:
        mask = batch.mask(llama)
        found: list[list[tuple[list[int], int]]] = [[] for _ in range(batch.continuations)]
        for owner, prediction, token in zip(
            batch.owners.tolist(), batch.asked.tolist(), batch.tokens.tolist(), strict=True
        ):
            place = int(batch.places[prediction])
            found[owner].append((read_before(batch, place, mask), token))
        expected = [
            [([*asked[n].prompt, *each[:k]], token) for k, token in enumerate(each)]
            for n in batch.queries
            for each in asked[n].continuations
        ]
        assert found == expected
        assert batch.lengths.tolist() == [len(each) for each in expected]


@given(queries, st.booleans(), st.integers(1, 3))
def test_a_batch_keeps_to_its_budget(
    llama: PreTrainedModel, asked: list[Query], by_blocks: bool, at_once: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trees, "TREE_TOKENS", 15)
        patch.setattr(trees, "LEAST_AT_ONCE", 10)
        patch.setattr(trees, "reads_blocks", lambda _: by_blocks)
        budget = Budget(40, predictions=6, rows=3)
        for batch in plan_batches(llama, asked, budget, at_once=at_once):
            rows, width = batch.ids.shape
            alone = len(batch.queries) == 1 if by_blocks else rows == 1
            together = len(batch.queries) if by_blocks else rows
            assert alone or (together <= 3 and rows * width <= 40 and len(batch.places) <= 6)


def test_batches_that_are_read_at_once_are_even(llama: PreTrainedModel) -> None:
    """And have the budget together."""
    asked = [Query([n // 7, 8, n % 7, 9], [[n % 5] * (n % 30 + 2)]) for n in range(600)]
    for tokens, count in ((20_000, 2), (5_000, 6)):
        read = [
            int(batch.read.sum()) for batch in plan_batches(llama, asked, Budget(tokens), at_once=2)
        ]
        assert len(read) == count
        assert max(read) <= tokens / 2
        assert max(read) - min(read) <= 40 * count
    assert len(list(plan_batches(llama, asked[:100], Budget(20_000), at_once=2))) == 1


def test_what_texts_share_is_read_once(llama: PreTrainedModel) -> None:
    asked = [Query([5, 6, n], [[8, 9, 10], [8, 9, 11], [12]]) for n in range(7, 12)]
    (batch,) = plan_batches(llama, asked, Budget(1000))
    # 5 6, and for each prompt its last token and 8 9, after which 10 and 11 are predicted.
    assert int(batch.read.sum()) == batch.ids.numel() == 2 + 5 * 3
    assert len(batch.places) == 5 * 3
    assert len(batch.asked) == 5 * 7


def test_what_all_texts_of_several_trees_begin_with_is_read_once(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    beginning = [5] * 30
    asked = [Query([*beginning, 6 + n, *range(6, 56)], [[n]]) for n in range(8)]
    (batch,) = plan_batches(llama, asked, Budget(1000))
    assert batch.ids.shape == (1, 30 + 8 * 51)
    monkeypatch.setattr(trees, "reads_blocks", lambda _: False)
    (batch,) = plan_batches(llama, asked, Budget(1000))
    assert batch.shared == beginning
    assert batch.ids.shape == (8, 51)
    (alone,) = plan_batches(llama, asked[:1], Budget(1000))
    assert not alone.shared


def test_what_is_scored_has_few_sizes(llama: PreTrainedModel) -> None:
    """Else each batch would have its own, of which PyTorch keeps what it prepares."""
    sizes = set()
    for count in range(700, 710):
        samples = [EncodedSample([5, 6], [7] * count), EncodedSample([6], [7] * count)]
        (batch,) = ResponseReader(llama, questions(samples)).batches
        assert 0 <= batch.ids.numel() - int(batch.read.sum()) <= batch.ids.numel() // 32
        sizes.add((batch.ids.shape, batch.places.shape))
    assert len(sizes) <= 3  # of ten


def test_texts_are_apart_where_the_body_takes_no_positions() -> None:
    """Of trees it would count the tokens of a row."""
    samples = [EncodedSample([5, 6, 7], [8, 9]), EncodedSample([5, 6], [10, 11, 12])]
    model = model_of("llama")
    expected = response_scores(model, samples, openings=[OPENINGS] * 2)
    own = model.model.forward
    model.model.forward = lambda input_ids, **others: own(input_ids, **others)
    assert not trees.reads_trees(model, 64)
    for one, other in zip(
        response_scores(model, samples, openings=[OPENINGS] * 2), expected, strict=True
    ):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_family_reads_trees(family: str) -> None:
    model = model_of(family)
    assert trees.reads_trees(model, 64)
    assert trees.reads_trees(model, 65) == (family != "mistral")  # its window


def test_models_that_a_mask_does_not_govern_read_texts(llama: PreTrainedModel) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama.config, "layer_types", ["linear_attention"], raising=False)
        assert not trees.reads_trees(llama, 10)
        patch.undo()
        patch.setattr(type(llama), "_is_stateful", True)
        assert not trees.reads_trees(llama, 10)
        patch.undo()
        patch.setattr(llama.config, "_attn_implementation_internal", "flash_attention_2")
        assert not trees.reads_trees(llama, 10)
    assert trees.reads_trees(llama, 10)


@pytest.mark.parametrize("implementation", ["blocks", "sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_gives_what_the_texts_give(
    family: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family)
    if implementation == "sdpa":
        monkeypatch.setattr(trees, "reads_blocks", lambda _: False)
    elif implementation == "eager":
        model.set_attn_implementation("eager")
    rng = random.Random(0)
    prompts = [rng.choices(range(5, 9), k=rng.randrange(1, 12)) for _ in range(30)]
    samples = [EncodedSample([5, 6, *each], rng.choices(range(5, 9), k=6)) for each in prompts]
    read = [ResponseReader(model, questions(samples, [OPENINGS] * 30))]
    monkeypatch.setattr(trees, "reads_trees", lambda *_: False)
    read.append(ResponseReader(model, questions(samples, [OPENINGS] * 30)))
    tokens = [sum(int(batch.read.sum()) for batch in each.batches) for each in read]
    assert tokens[0] < 0.6 * tokens[1]
    for one, other in zip(*(each.scores().each() for each in read), strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert one.decision_margin == pytest.approx(other.decision_margin, abs=1e-5)


def test_a_wrapper_is_read_to_its_end(llama: PreTrainedModel) -> None:
    """Such as PEFT's, whose body cannot be told from the model."""
    from peft import LoraConfig, get_peft_model

    samples = [EncodedSample([5, 6, 7], [8, 9]), EncodedSample([5, 6], [10, 11, 12])]
    expected = response_scores(llama, samples, openings=[OPENINGS] * 2)
    adapted = get_peft_model(model_of("llama"), LoraConfig(task_type="CAUSAL_LM", r=2)).eval()
    found = response_scores(adapted, samples, openings=[OPENINGS] * 2)
    for one, other in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert one.decision_margin == pytest.approx(other.decision_margin, abs=1e-5)
