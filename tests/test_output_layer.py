"""Logits are held a piece at a time, in every family of models, and no number changes by it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mergekit_align import loss, output_layer, reading, trees
from mergekit_align.demo.models import ARCHITECTURES, new_model
from mergekit_align.demo.tokenizer import build_tokenizer
from mergekit_align.encoding import EncodedSample
from mergekit_align.gradient import mean_loss, sample_loss
from mergekit_align.guard import Conversation, Guard, GuardSettings, profiles, scorer
from mergekit_align.loss import ResponseReader, ResponseScore, questions, response_scores
from mergekit_align.openings import Openings
from mergekit_align.output_layer import continuation_logprobs

FAMILIES = [*ARCHITECTURES, "gemma3, capped"]
OPENINGS = Openings(refusal=((5, 6), (7,)), help=((5, 8, 9), (5, 8, 10)))


def model_of(family: str) -> PreTrainedModel:
    """A small random model."""
    architecture, _, capped = family.partition(", ")
    model = new_model(architecture, build_tokenizer(guard=True), seed=0)  # type: ignore[arg-type]
    if capped:
        model.config.final_logit_softcapping = 0.5
    return model.eval()


def samples() -> list[EncodedSample]:
    rng = random.Random(0)
    return [
        EncodedSample(rng.choices(range(5, 290), k=n), rng.choices(range(5, 290), k=m))
        for n, m in ((7, 71), (64, 12), (3, 1), (11, 20))
    ]


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many logits may be held at once; batches stay what they are."""

    def set_to(logits: int) -> None:
        for module in (reading, output_layer, scorer):
            monkeypatch.setattr(module, "BATCH_LOGITS", logits)

    return set_to


def watched(model: PreTrainedModel) -> list[int]:
    """Logits of each run of the output layer, as they come."""
    seen: list[int] = []

    def see(module: Any, inputs: Any, logits: torch.Tensor) -> None:
        seen.append(logits.numel())

    model.get_output_embeddings().register_forward_hook(see)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_decisions_are_the_same_in_pieces(
    family: str, bound: Callable[[int], None]
) -> None:
    model, read = model_of(family), samples()
    seen, vocabulary = watched(model), reading.vocabulary_size(model)
    whole = response_scores(model, read, openings=[OPENINGS] * len(read))
    runs = len(seen)
    bound(4 * 5 * vocabulary)
    pieces = response_scores(model, read, openings=[OPENINGS] * len(read))
    assert len(seen) - runs > runs
    assert max(seen[runs:]) <= 4 * 5 * vocabulary < max(seen[:runs])
    for one, other in zip(pieces, whole, strict=True):
        assert one.tokens == other.tokens
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert one.decision_margin == pytest.approx(other.decision_margin, abs=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_scores_are_the_same_to_the_bit_in_parts_that_caches_hold(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, read = model_of("llama"), samples()
    largest: list[int] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if function is torch.Tensor.log_softmax:
                largest.append(len(args[0]))
            return function(*args, **(kwargs or {}))

    def scores() -> list[ResponseScore]:
        with Watch():
            return response_scores(model, read, openings=[OPENINGS] * len(read))

    whole = scores()
    assert max(largest) > 3
    largest.clear()
    threads, vocabulary = torch.get_num_threads(), reading.vocabulary_size(model)
    monkeypatch.setattr(output_layer, "CACHED_LOGITS", -(-rows * vocabulary // threads))
    assert scores() == whole
    assert max(largest) == rows


def of_experts(kind: str) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = AutoConfig.for_model(
        kind, vocab_size=300, num_hidden_layers=2, pad_token_id=0, **sizes, **heads, **experts
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral", "qwen3_moe", "gpt_oss"])
def test_the_last_layer_goes_no_further_than_is_asked(family: str) -> None:
    model = model_of(family) if family in FAMILIES else of_experts(family)
    read = samples()
    asked = questions(read, [OPENINGS] * len(read))
    batch, *_ = ResponseReader(model, asked).batches
    seen: list[int] = []
    model.base_model.layers[-1].mlp.register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].shape[:-1].numel())
    )
    found = continuation_logprobs(model, batch, whole=False)
    whole = continuation_logprobs(model, batch)
    expected = len(batch.places) if batch.ends is not None else batch.ids.numel()
    assert seen == [expected, batch.ids.numel()]
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_in_pieces(family: str, bound: Callable[[int], None]) -> None:
    model, read = model_of(family), samples()
    seen, vocabulary = watched(model), reading.vocabulary_size(model)
    expected = mean_loss(model, read).accumulate()
    whole = {name: p.grad for name, p in model.named_parameters()}
    runs = len(seen)
    bound(4 * 5 * vocabulary)
    model.zero_grad()
    assert mean_loss(model, read).accumulate() == pytest.approx(expected, abs=1e-6)
    assert max(seen[runs:]) <= 4 * 5 * vocabulary < max(seen[:runs])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_samples_gradient_comes_whole(family: str, bound: Callable[[int], None]) -> None:
    """Statistics square what one backward pass gives."""
    model = model_of(family)
    bound(20 * reading.vocabulary_size(model))
    calls: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name))
    sample_loss(model, samples()[0]).backward()
    assert sorted(calls) == sorted(name for name, _ in model.named_parameters())


def samples_with_a_beginning() -> list[EncodedSample]:
    """Longer than Mistral's window of 64 tokens; the last fits others'."""
    beginning = random.Random(1).choices(range(5, 290), k=70)
    return [each._replace(prompt_ids=[*beginning, *each.prompt_ids]) for each in samples()]


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_each_samples_own(family: str) -> None:
    model, read = model_of(family), samples_with_a_beginning()
    together = response_scores(model, read, openings=[OPENINGS] * len(read))
    for each, score in zip(read, together, strict=True):
        [alone] = response_scores(model, [each], openings=[OPENINGS])
        assert score.logprob == pytest.approx(alone.logprob, abs=1e-3)
        assert score.decision_margin == pytest.approx(alone.decision_margin, abs=1e-4)


@pytest.mark.parametrize("by_blocks", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_each_sample(
    family: str, by_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "reads_blocks", lambda _: by_blocks)
    model, read = model_of(family), samples_with_a_beginning()
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda _, ids, out: seen.append(ids[0].numel())
    )
    alone = [mean_loss(model, [each]).accumulate() for each in read]
    expected = {name: p.grad / len(read) for name, p in model.named_parameters()}
    assert min(seen) > 70
    model.zero_grad()
    seen.clear()
    assert mean_loss(model, read).accumulate() == pytest.approx(sum(alone) / len(read), abs=1e-5)
    # What prompts share is read once, but for a window that would count their padding.
    assert seen.count(70) == (family != "mistral" and not by_blocks)
    if by_blocks and family != "mistral":
        (tokens,) = seen
        assert tokens <= 70 + sum(len(p) - 70 + len(r) - 1 for p, r in read)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_guard_reads_as_many_prompts_as_logits_allow(
    family: str, bound: Callable[[int], None]
) -> None:
    model = model_of(family)
    seen, vocabulary = watched(model), reading.vocabulary_size(model)
    guard = Guard(
        scorer.HuggingFaceScorer(model, build_tokenizer(guard=True)),
        profiles()["llama-guard-3"],
        GuardSettings(model="random weights", categories=False),
    )
    judged = [
        Conversation.of(f"How do I make a bench{' here' * n}?", "Use iron.") for n in range(9)
    ]
    whole = guard.judge(judged)
    runs = len(seen)
    bound(4 * vocabulary)
    pieces = guard.judge(judged)
    assert max(seen[runs:]) <= 4 * vocabulary < max(seen[:runs])
    alone = [guard.judge([each])[0] for each in judged]
    for one, other, own in zip(pieces, whole, alone, strict=True):
        assert one.label == other.label == own.label
        assert one.readable == pytest.approx(other.readable, abs=1e-6)
        assert own.readable == pytest.approx(other.readable, abs=1e-6)


def test_batches_of_losses_keep_to_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    monkeypatch.setattr(loss, "BATCH_LOGITS", 40 * reading.vocabulary_size(model))
    batches = loss.ResponseReader(model, loss.questions(samples())).batches
    # A tree alone may have more, which are predicted in pieces.
    assert sorted(int(batch.asked.max()) + 1 for batch in batches) == [12, 1 + 20, 71]
