"""Attention by plain products is PyTorch's, and is used where it is faster."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mergekit_align import attention
from mergekit_align.encoding import EncodedSample
from mergekit_align.gradient import mean_loss
from mergekit_align.loss import response_scores

SAMPLES = [EncodedSample([5, 6, 7, 8], [9, 10]), EncodedSample([5, 6, 11], [12, 13, 14])]


def given(
    heads: int, key_heads: int, tokens: int, known: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    seen = torch.rand(3, 1, tokens, known + tokens, generator=generator) > 0.5
    seen[:, 0, :, known:] |= torch.eye(tokens, dtype=torch.bool)
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    keys = 3, key_heads, known + tokens
    return [drawn(3, heads, tokens, 16), drawn(*keys, 16), drawn(*keys, 24), mask]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", [None, 0.1])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize(("tokens", "known"), [(32, 0), (27, 0), (27, 9)])
def test_outputs_and_gradients_are_those_of_the_fused_kernel(
    tokens: int, known: int, key_heads: int, scaling: float | None, dtype: torch.dtype
) -> None:
    inputs = given(4, key_heads, tokens, known, dtype)
    module = torch.nn.Module()
    module.num_key_value_groups = 4 // key_heads  # type: ignore[assignment]
    both = []
    for function in (attention._by_products, sdpa_attention_forward):
        output, _ = function(module, *inputs, scaling=scaling)
        both.append((output, *torch.autograd.grad(output.square().sum(), inputs[:3])))
    for one, other in zip(*both, strict=True):
        assert one.shape == other.shape
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def test_what_else_a_model_has_done_to_the_scores_is_left_to_the_fused_kernel() -> None:
    inputs = given(4, 4, 8, 0, torch.float32)
    for name, value in (("position_bias", torch.randn(1, 4, 8, 8)), ("dropout", 1.0)):
        output, _ = attention._by_products(torch.nn.Module(), *inputs, **{name: value})
        expected, _ = sdpa_attention_forward(torch.nn.Module(), *inputs, **{name: value})
        torch.testing.assert_close(output, expected)
    with pytest.raises(ValueError, match="softcap"):
        attention._by_products(torch.nn.Module(), *inputs, softcap=30.0)


def kernels(run: object) -> set[str]:
    with torch.profiler.profile() as profile:
        run()  # type: ignore[operator]
    return {event.name for event in profile.events() if "scaled_dot_product" in event.name}


def test_trees_are_read_by_products_and_the_model_is_left_as_it_was() -> None:
    from test_output_layer import model_of

    model = model_of("llama")
    assert not kernels(lambda: response_scores(model, SAMPLES))
    assert not kernels(lambda: mean_loss(model, SAMPLES).accumulate())
    assert model.config._attn_implementation == "sdpa"


def test_as_many_scores_as_would_fill_memory_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    from test_output_layer import model_of

    model = model_of("llama")
    expected = response_scores(model, SAMPLES)
    monkeypatch.setattr(attention, "MOST_SCORES", 20)
    assert kernels(lambda: response_scores(model, SAMPLES))
    for one, other in zip(response_scores(model, SAMPLES), expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)


def test_another_attention_stays() -> None:
    from test_output_layer import model_of

    model = model_of("llama")
    model.set_attn_implementation("eager")
    with attention.short_attention(model):
        assert model.config._attn_implementation == "eager"
