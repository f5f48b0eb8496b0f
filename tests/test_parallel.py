"""Threads that read a model at once find what one finds."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from test_output_layer import model_of
from transformers import PreTrainedModel

from mergekit_align import loss, trees
from mergekit_align.encoding import EncodedSample
from mergekit_align.loss import ResponseReader, questions
from mergekit_align.parallel import MOST_READERS, Readers, one_thread, readers_of

SAMPLES = [
    EncodedSample([n // 9, 11, n % 9], [n % 7, *range(3 + n % 5, 12), n % 3]) for n in range(120)
]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model() -> PreTrainedModel:
    return model_of("llama").requires_grad_(False)


def reader(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> ResponseReader:
    monkeypatch.setattr(trees, "LEAST_AT_ONCE", 100)
    monkeypatch.setattr(loss, "BATCH_TOKENS", 800)
    return ResponseReader(model, questions(SAMPLES))


def test_they_find_what_one_finds(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ResponseReader(model, questions(SAMPLES))
    parts = reader(model, monkeypatch)
    assert len(whole.batches) == 1
    assert len(parts.batches) == 4
    before = parts.scores().logprobs
    np.testing.assert_allclose(before, whole.scores().logprobs, rtol=1e-5)
    for parameter in model.parameters():  # as a merge does
        parameter.data.mul_(1.5)
    after = parts.scores().logprobs
    assert not np.allclose(after, before, rtol=1e-2)
    np.testing.assert_allclose(after, whole.scores().logprobs, rtol=1e-5)


def test_each_has_its_share_of_the_processors_threads(model: PreTrainedModel) -> None:
    torch.set_num_threads(5)
    readers = Readers(model, 2)
    assert list(readers.map(lambda _, item: (torch.get_num_threads(), item), "abc")) == [
        (2, "a"),
        (2, "b"),
        (2, "c"),
    ]
    more = Readers(model, 6)
    assert list(more.map(lambda *_: torch.get_num_threads(), "abc")) == [1, 1, 1]
    assert torch.get_num_threads() == 5
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 5


def test_what_a_thread_fails_with_is_raised(model: PreTrainedModel) -> None:
    readers = Readers(model, 2)
    with pytest.raises(ZeroDivisionError):
        list(readers.map(lambda _, item: 1 // item, [1, 0, 1]))
    assert list(readers.map(lambda _, item: 1 // item, [1, 1, 1])) == [1, 1, 1]


def test_a_model_whose_copies_may_not_be_as_it_is_has_one_reader(model: PreTrainedModel) -> None:
    assert readers_of(model) == 2
    torch.set_num_threads(MOST_READERS + 1)
    assert readers_of(model) == MOST_READERS

    wrapped = copy.deepcopy(model)
    layer = wrapped.model.layers[0].mlp
    layer.forward = lambda states, own=layer.forward: own(states) * 2
    assert readers_of(wrapped) == 1

    hook = model.model.layers[1].register_forward_hook(lambda *_: None)
    assert readers_of(model) == 1
    hook.remove()
    model.config._attn_implementation = "eager"
    assert readers_of(model) == 1


def test_texts_in_rows_of_their_own_are_read_one_batch_after_another(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which have all of the budget, each."""
    monkeypatch.setattr(trees, "reads_trees", lambda *_: False)
    monkeypatch.setattr(loss, "Readers", None)
    parts = reader(model, monkeypatch)
    assert len(parts.batches) > 1
    assert np.isfinite(parts.scores().logprobs).all()


def test_a_hook_that_comes_later_is_heeded(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = reader(model, monkeypatch)
    parts.scores()
    seen = []
    with model.model.layers[0].register_forward_hook(lambda *_: seen.append(1)):
        parts.scores()
    assert len(seen) == 4
