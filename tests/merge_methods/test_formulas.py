"""Each method against its paper's formula, written out plainly here in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import PerInputValues, get
from mergekit.merge_methods.base import TensorGroup

from mergekit_align.samples import SampleType
from mergekit_align.statistics.files import Accumulators, Header, Kind

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


Statistics = dict[str, dict[str, torch.Tensor]]
"""Of each model's tensor, by sample type."""


def write_statistics(directory: Path, kind: Kind, statistics: Statistics) -> dict[str, str]:
    """Files as mergekit-align-stats writes them, of a tensor named "w"; directories by model."""
    for name, types in statistics.items():
        for type_, values in types.items():
            header = Header("", "", "", [], None, 0, cast(SampleType, type_), kind, {})
            file = Accumulators(directory / name, header, {"w": values.shape})
            file.tensors["w"].copy_(values)
            file.finish()
    return {name: str(directory / name) for name in statistics}


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
        base_index=chosen.index("base") if "base" in chosen else None,
        name="w",
        vocabulary_axis=vocabulary_axis,
    )
    own = [name for name in chosen if name != "base"]
    given: dict[str, Any] = {
        "weight": PerInputValues([(name, (weights or {}).get(name, 1.0)) for name in own]),
    }
    if any(parameter.name == "role" for parameter in get(method).spec.parameters):
        given["role"] = PerInputValues([(name, roles.get(name, name)) for name in own])
    for name, value in parameters.items():
        # A value for each model is given as a mapping.
        per_model = isinstance(value, dict)
        given[name] = PerInputValues([(n, value[n]) for n in own]) if per_model else value
    (merged,) = get(method)([group], parameters=given)
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


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eta", [0.2, 0.6, 1.0])
def test_lssf(shape: tuple[int, int], eta: float) -> None:
    m = tensors(shape)
    u, s, vh = torch.linalg.svd(m["aligned"] - m["base"], full_matrices=False)
    p = s / s.sum()
    terms = [-float(share) * math.log(float(share)) for share in p]
    rank = next((k for k in range(1, len(terms)) if sum(terms[:k]) >= eta * sum(terms)), len(terms))
    low = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
    found = merge("lssf", m, "base aligned expert", eta=eta, alpha=0.8)
    torch.testing.assert_close(found, m["expert"] + 0.8 * low, atol=1e-5, rtol=0)


def gram(width: int, tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    return inputs.T @ inputs / tokens


@pytest.mark.parametrize("method", ["regmean", "regmean_plus"])
@pytest.mark.parametrize("shape", SHAPES)
def test_regmean(method: str, shape: tuple[int, int], tmp_path: Path) -> None:
    m = tensors(shape)
    kind: Kind = "gram" if method == "regmean" else "propagated_gram"
    grams = {
        "aligned": {"alignment": gram(shape[1], 40, 1), "benign": gram(shape[1], 40, 2)},
        "expert": {"task": gram(shape[1], 40, 3)},
    }
    places = write_statistics(tmp_path, kind, grams)
    g = {
        "aligned": 2.0 * (1.5 * grams["aligned"]["alignment"] + grams["aligned"]["benign"]),
        "expert": 0.5 * grams["expert"]["task"],
    }
    g = {name: 0.8 * each + 0.2 * torch.diag(each.diag()) for name, each in g.items()}
    total = torch.linalg.inv(g["aligned"] + g["expert"])
    expected = (m["aligned"] @ g["aligned"] + m["expert"] @ g["expert"]) @ total
    found = merge(
        method,
        m,
        "aligned expert",
        weights={"aligned": 2.0, "expert": 0.5},
        statistics=places,
        alignment_weight=1.5,
        off_diagonal=0.8,
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interference", [0.0, 0.1, 2.0])
def test_align_adaptive_minimises_what_it_says(
    shape: tuple[int, int], interference: float, tmp_path: Path
) -> None:
    m = tensors(shape)
    width = shape[1]
    g = {"aligned": gram(width, 2, 1), "expert": gram(width, 3, 2), "other": gram(width, 50, 3)}
    places = write_statistics(tmp_path, "gram", {name: {"task": each} for name, each in g.items()})
    weights = {"aligned": 1.0, "expert": 0.7, "other": 0.2}
    ridge = 1e-3 * float(sum(g.values()).diagonal().mean()) * torch.eye(width)  # type: ignore[union-attr]
    expected = m["base"].clone()
    for name, own in g.items():
        task_vector = m[name] - m["base"]
        others = sum(each for other, each in g.items() if other != name)
        system = own + interference * others + ridge
        expected += weights[name] * task_vector @ (own + ridge) @ torch.linalg.inv(system)
    found = merge(
        "align_adaptive",
        m,
        "base aligned expert other",
        weights=weights,
        statistics=places,
        interference=interference,
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    if interference == 0:
        whole = m["base"] + sum(weights[n] * (m[n] - m["base"]) for n in g)
        torch.testing.assert_close(found, whole, atol=1e-9, rtol=0)


def test_regmean_is_the_average_where_nothing_was_read(tmp_path: Path) -> None:
    m = tensors((4, 6))
    rank_one = torch.zeros(6, 6)
    rank_one[0, 0] = 1.0
    statistics = {"aligned": {"task": rank_one}, "expert": {"task": 0 * rank_one}}
    places = write_statistics(tmp_path, "gram", statistics)
    found = merge("regmean", m, "aligned expert", statistics=places)
    average = (m["aligned"] + m["expert"]) / 2
    torch.testing.assert_close(found[:, 1:], average[:, 1:])
    torch.testing.assert_close(found[:, 0], m["aligned"][:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [*SHAPES, (7,), (2, 3, 4)])
def test_fisher(shape: tuple[int, ...], tmp_path: Path) -> None:
    m = tensors(shape)
    f = {name: value.square() for name, value in tensors(shape, 5).items()}
    statistics = {
        "aligned": {"alignment": f["base"], "benign": f["safe"]},
        "expert": {"task": f["expert"]},
    }
    places = write_statistics(tmp_path, "fisher", statistics)
    first = 3.0 * (2.0 * f["base"] + 0.5 * f["safe"])
    second = 0.25 * f["expert"]
    expected = (first * m["aligned"] + second * m["expert"]) / (first + second)
    found = merge(
        "fisher",
        m,
        "aligned expert",
        weights={"aligned": 3.0},
        statistics=places,
        alignment_weight=2.0,
        benign_weight=0.5,
        task_weight=0.25,
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [*SHAPES, (7,), (2, 3, 4)])
@pytest.mark.parametrize("ratio", [0.3, 0.7, 1.0])
def test_led(shape: tuple[int, ...], ratio: float, tmp_path: Path) -> None:
    m = tensors(shape)
    scores = {name: value.abs().float() for name, value in tensors(shape, 7).items()}
    own = write_statistics(
        tmp_path / "own",
        "importance",
        {"aligned": {"alignment": scores["aligned"]}, "expert": {"task": scores["expert"]}},
    )
    base = write_statistics(
        tmp_path / "base",
        "importance",
        {"aligned": {"alignment": scores["base"]}, "expert": {"task": scores["safe"]}},
    )

    def top(name: str) -> set[int]:
        flat = scores[name].flatten().tolist()
        return set(sorted(range(len(flat)), key=lambda n: -flat[n])[: round(ratio * len(flat))])

    first, second = top("aligned") & top("base"), top("expert") & top("safe")
    expected = m["base"].flatten().clone()
    for name, weight, mask in (("aligned", 1.0, first - second), ("expert", 0.6, second - first)):
        for n in mask:
            expected[n] += weight * (m[name].flatten()[n] - m["base"].flatten()[n])
    found = merge(
        "led",
        m,
        "base aligned expert",
        weights={"expert": 0.6},
        statistics=own,
        base_statistics=base,
        ratio={"aligned": ratio, "expert": ratio},
    )
    torch.testing.assert_close(found.flatten(), expected, atol=1e-5, rtol=0)


DATA_AWARE: dict[str, tuple[str, Kind]] = {
    "align_adaptive": ("base aligned expert", "gram"),
    "fisher": ("aligned expert", "fisher"),
    "regmean": ("aligned expert", "gram"),
    "regmean_plus": ("aligned expert", "propagated_gram"),
}


@pytest.mark.parametrize("method", DATA_AWARE)
def test_identical_models_return_themselves_whatever_the_data(method: str, tmp_path: Path) -> None:
    names, kind = DATA_AWARE[method]
    m = dict.fromkeys(tensors((5, 7)), tensors((5, 7))["expert"])
    size = 5 if kind == "fisher" else 7
    own = {name: {"task": gram(7, 9, n)[:size]} for n, name in enumerate(("aligned", "expert"))}
    places = write_statistics(tmp_path, kind, own)
    found = merge(method, m, names, statistics=places)
    torch.testing.assert_close(found, m["base"], atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", DATA_AWARE)
def test_data_aware_methods_do_not_depend_on_the_order(method: str, tmp_path: Path) -> None:
    names, kind = DATA_AWARE[method]
    m = tensors((5, 7))
    size = 5 if kind == "fisher" else 7
    own = {name: {"task": gram(7, 9, n)[:size]} for n, name in enumerate(("aligned", "expert"))}
    places = write_statistics(tmp_path, kind, own)
    turned = " ".join(reversed(names.split()))
    torch.testing.assert_close(
        merge(method, m, names, statistics=places),
        merge(method, m, turned, statistics=places),
        atol=1e-9,
        rtol=0,
    )


@pytest.mark.parametrize("method", DATA_AWARE)
@pytest.mark.parametrize("shape", [(6, 4), (1, 1), (4,), (0,), (0, 3)])
def test_data_aware_methods_take_bfloat16(
    method: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    names, kind = DATA_AWARE[method]
    m = tensors(shape, dtype=torch.bfloat16)
    given = shape if kind == "fisher" else (shape[-1], shape[-1])
    matrix = len(shape) == 2 or kind == "fisher"
    value = gram(given[0], 9, 1) if kind != "fisher" else torch.rand(given)
    own = {name: {"task": value} for name in ("aligned", "expert")} if matrix else {}
    places = write_statistics(tmp_path, kind, own)
    if not matrix:  # statistics are there, but not of this tensor
        header = Header("", "", "", [], None, 0, "task", kind, {})
        for name in ("aligned", "expert"):
            Accumulators(tmp_path / name, header, {"v": (1,)}).finish()
        places = {name: str(tmp_path / name) for name in ("aligned", "expert")}
    found = merge(method, m, names, statistics=places)
    assert found.shape == shape
    assert bool(found.isfinite().all())


ALL = {
    "lssf": "base aligned expert",
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


@pytest.mark.parametrize("method", [*ALL, *DATA_AWARE])
def test_strided_tensors_are_merged_and_left_alone(method: str, tmp_path: Path) -> None:
    m = tensors((5, 7))
    strided = {name: tensor.T.contiguous().T for name, tensor in m.items()}
    if method in ALL:
        names, more = ALL[method], {}
    else:
        names, kind = DATA_AWARE[method]
        value = gram(7, 9, 1)[: 5 if kind == "fisher" else 7]
        own = {name: {"task": value} for name in ("aligned", "expert")}
        more = {"statistics": write_statistics(tmp_path, kind, own)}
    torch.testing.assert_close(
        merge(method, strided, names, **more), merge(method, m, names, **more), atol=1e-9, rtol=0
    )
    for name, tensor in m.items():
        assert torch.equal(strided[name], tensor)


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
        ("lssf", "eta", 0.0),
        ("resta", "origin", "elsewhere"),
    ],
)
def test_a_value_out_of_range_is_refused(method: str, parameter: str, value: Any) -> None:
    with pytest.raises(ValueError, match="Input should be"):
        merge(method, tensors((3, 3)), ALL[method], **{parameter: value})
