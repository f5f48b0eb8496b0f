"""Each method against its paper's formula, written out plainly here in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import PerInputValues, get
from mergekit.merge_methods.base import TensorGroup

Tensors = dict[str, torch.Tensor]
SHAPES = [(6, 6), (5, 9), (9, 5), (1, 4), (4, 1)]


def tensors(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> torch.Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    base = noise(1.0)
    aligned = base + noise(0.1)
    models = {
        "base": base,
        "aligned": aligned,
        "expert": aligned + noise(0.2),
        "other": aligned + noise(0.3),
        "safe": aligned + noise(0.05),
    }
    return {name: tensor.to(dtype) for name, tensor in models.items()}


def merge(
    method: str,
    models: Tensors,
    names: str,
    *,
    weights: dict[str, float] | None = None,
    vocabulary_axis: int | None = None,
    **parameters: Any,
) -> torch.Tensor:
    """`method` of the named models, "base" the base and "other" a second expert."""
    chosen = names.split()
    roles = {"other": "expert"}
    group = TensorGroup.from_tensors(
        [models[name] for name in chosen],
        ids=chosen,
        base_index=chosen.index("base"),
        vocabulary_axis=vocabulary_axis,
    )
    own = [name for name in chosen if name != "base"]
    given = {
        "role": PerInputValues([(name, roles.get(name, name)) for name in own]),
        "weight": PerInputValues([(name, (weights or {}).get(name, 1.0)) for name in own]),
    }
    (merged,) = get(method)([group], parameters={**given, **parameters})
    return merged


def operator(models: Tensors) -> torch.Tensor:
    """Safe LoRA's C, materialised."""
    v = models["aligned"] - models["base"]
    return v @ v.T / v.norm()


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tau", [-1.0, 0.3, 0.6, 1.0])
def test_safe_lora(shape: tuple[int, int], tau: float) -> None:
    m = tensors(shape)
    expected = m["aligned"].clone()
    for name, weight in (("expert", 0.7), ("other", 0.4)):
        update = m[name] - m["aligned"]
        projected = operator(m) @ update
        expected += weight * (projected if cosine(update, projected) < tau else update)
    found = merge(
        "safe_lora", m, "base aligned expert other", weights={"expert": 0.7, "other": 0.4}, tau=tau
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tau", [-1.0, 0.4, 1.0])
def test_safemerge(shape: tuple[int, int], tau: float) -> None:
    m = tensors(shape)
    update, safe = m["expert"] - m["aligned"], m["safe"] - m["aligned"]
    deviates = cosine(update, operator(m) @ update) < tau
    expected = m["aligned"] + (0.3 * update + 0.7 * safe if deviates else update)
    found = merge("safemerge", m, "base aligned expert safe", tau=tau, alpha=0.3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [*SHAPES, (7,), (0,), (2, 3, 4)])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 1.7])
def test_resta(shape: tuple[int, ...], gamma: float) -> None:
    m = tensors(shape)
    expected = m["expert"] + gamma * (m["aligned"] - m["base"])
    for origin in ("aligned", "base"):
        found = merge("resta", m, "base aligned expert", gamma=gamma, origin=origin)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_resta_keeps_a_share_of_the_update_and_its_mean() -> None:
    m = tensors((400, 400))
    torch.manual_seed(0)
    found = merge("resta", m, "base aligned expert", gamma=0.0, density=0.25)
    update, original = found - m["aligned"], m["expert"] - m["aligned"]
    kept = update.abs() > 1e-12
    assert float(kept.double().mean()) == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(update[kept], original[kept] / 0.25, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 20])
def test_lox(shape: tuple[int, int], rank: int) -> None:
    m = tensors(shape)
    u, s, vh = torch.linalg.svd(m["aligned"] - m["base"], full_matrices=False)
    low = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
    expected = m["aligned"] + 1.5 * low
    found = merge("lox", m, "base aligned", rank=rank, alpha=1.5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    with_expert = merge(
        "lox", m, "base aligned expert", weights={"expert": 0.5}, rank=rank, alpha=1.5
    )
    expected += 0.5 * (m["expert"] - m["base"])
    torch.testing.assert_close(with_expert, expected, atol=1e-5, rtol=0)


ALL = {
    "lox": "base aligned expert",
    "resta": "base aligned expert",
    "safe_lora": "base aligned expert",
    "safemerge": "base aligned expert safe",
}


@pytest.mark.parametrize("method", ALL)
@settings(deadline=None, max_examples=20)
@given(st.sampled_from(SHAPES), st.integers(0, 2**31))
def test_identical_models_return_themselves(method: str, shape: tuple[int, int], seed: int) -> None:
    m = dict.fromkeys(tensors(shape), tensors(shape, seed)["expert"])
    torch.testing.assert_close(merge(method, m, ALL[method]), m["base"], atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", ["safe_lora", "safemerge"])
@settings(deadline=None, max_examples=20)
@given(st.sampled_from(SHAPES), st.integers(0, 2**31))
def test_tau_below_every_cosine_returns_the_expert(
    method: str, shape: tuple[int, int], seed: int
) -> None:
    m = tensors(shape, seed)
    found = merge(method, m, ALL[method], tau=-1.0)
    torch.testing.assert_close(found, m["expert"], atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", ALL)
@settings(deadline=None, max_examples=10)
@given(st.permutations(["base", "aligned", "expert", "other", "safe"]))
def test_the_order_of_the_models_does_not_matter(method: str, order: list[str]) -> None:
    m = tensors((5, 7))
    names = {*ALL[method].split(), "other"}
    expected = merge(method, m, " ".join(sorted(names)))
    found = merge(method, m, " ".join(name for name in order if name in names))
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("shape", [(6, 4), (4,), (0,), (0, 3), (1, 1)])
def test_bfloat16_in_and_out_whatever_the_shape(method: str, shape: tuple[int, ...]) -> None:
    exact = tensors(shape)
    m = tensors(shape, dtype=torch.bfloat16)
    found = merge(method, m, ALL[method])
    assert found.shape == shape
    assert bool(found.isfinite().all())
    expected = merge(method, {name: t.double() for name, t in m.items()}, ALL[method])
    torch.testing.assert_close(found.double(), expected, atol=0.05, rtol=0.02)
    assert exact.keys() == m.keys()


@pytest.mark.parametrize("method", ["safe_lora", "safemerge"])
def test_what_is_no_matrix_is_averaged(method: str) -> None:
    for shape, axis in (((7,), None), ((7, 3), 0)):
        m = tensors(shape)
        found = merge(method, m, ALL[method], vocabulary_axis=axis)
        torch.testing.assert_close(found, (m["aligned"] + m["expert"]) / 2, atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", ["safe_lora", "safemerge"])
def test_without_an_alignment_vector_nothing_deviates(method: str) -> None:
    m = tensors((5, 6))
    m["base"] = m["aligned"]
    torch.testing.assert_close(merge(method, m, ALL[method], tau=1.0), m["expert"])


@pytest.mark.parametrize(
    ("method", "parameter", "value"),
    [
        ("safe_lora", "tau", 1.1),
        ("safemerge", "alpha", -0.1),
        ("lox", "rank", 0),
        ("resta", "density", 0.0),
        ("resta", "origin", "elsewhere"),
    ],
)
def test_a_value_out_of_range_is_refused(method: str, parameter: str, value: Any) -> None:
    with pytest.raises(ValueError, match="Input should be"):
        merge(method, tensors((3, 3)), ALL[method], **{parameter: value})
