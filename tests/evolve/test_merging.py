"""A candidate in memory is what `mergekit-yaml` writes for the same config, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods import get, registered_methods
from mergekit.merge_methods.base import BasePolicy
from mergekit.options import MergeOptions
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from mergekit_align.demo.tokenizer import build_tokenizer
from mergekit_align.evolve import kernels as merge_kernels
from mergekit_align.evolve import merging
from mergekit_align.evolve.compiled import COMPILED
from mergekit_align.evolve.kernels import KERNELS
from mergekit_align.evolve.merging import MergedModel
from mergekit_align.merge_methods.methods import METHODS as OUR_METHODS
from mergekit_align.samples import Sample, save_samples
from mergekit_align.statistics.collect import Source, collect_statistics
from mergekit_align.statistics.propagate import collect_propagated

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "llama, untied": {"model_type": "llama", "tie_word_embeddings": False},
    "qwen3": {},
    "gemma2": {},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
}
NAMES = ("base", "one", "two", "three")
OPTIONS = MergeOptions(quiet=True, random_seed=5)
PARAMETERS = {"density": 0.4, "weight": 0.7, "gamma": 0.02, "epsilon": 0.1, "t": 0.3}


def make_models(directory: Path, kind: str, tokenizer: Any) -> None:
    settings = {"model_type": kind.split(",")[0], **ARCHITECTURES[kind]}
    config = AutoConfig.for_model(
        **{**({} if kind == "gpt2" else SIZES), **settings},
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    for seed, name in enumerate(NAMES):
        set_seed(seed)
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        for parameter in model.parameters():  # norms too are to differ
            parameter.data += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    make_models(directory, "llama", tokenizer)
    return directory


def merge_config(
    directory: Path, method: str, *, base: bool = True, count: int = 2, **more: Any
) -> MergeConfiguration:
    own = [{"weight": 0.7, "density": 0.4}, {"weight": 0.9, "density": 0.55}]
    return MergeConfiguration.model_validate(
        {
            "merge_method": method,
            "base_model": str(directory / "base") if base else None,
            "models": [
                {"model": str(directory / name), "parameters": parameters}
                for name, parameters in zip(("one", "two"), own, strict=True)
            ][:count],
            "dtype": "bfloat16",
            "parameters": {"normalize": False, "t": 0.3, "gamma": 0.02, "epsilon": 0.1},
            **more,
        }
    )


def on_disk(config: MergeConfiguration, out: Path) -> dict[str, torch.Tensor]:
    run_merge(config.model_copy(deep=True), str(out), OPTIONS)
    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32
    ).state_dict()
    return state


def differing(model: Any, expected: dict[str, torch.Tensor]) -> list[str]:
    found = model.state_dict()
    assert set(found) == set(expected)
    return [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


@pytest.fixture(params=["small", "by stretches", "compiled"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "by stretches":
        monkeypatch.setattr(merge_kernels, "ENTRIES", 0)
    elif request.param == "compiled":
        monkeypatch.setattr(merging, "SMALL", 0)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_architecture(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    make_models(tmp_path, kind, tokenizer)
    config = merge_config(tmp_path, "ties")
    merged = MergedModel(config, OPTIONS)
    merged.merge(config)
    assert differing(merged.model, on_disk(config, tmp_path / "out")) == []


@pytest.mark.usefixtures("kernels")
def test_what_another_method_wrote_is_merged_anew(llama: Path) -> None:
    ours, theirs = merge_config(llama, "ties"), merge_config(llama, "dare_ties")
    merged = MergedModel(ours, OPTIONS)
    merged.merge(ours)
    expected = {name: tensor.clone() for name, tensor in merged.model.state_dict().items()}
    merged.merge(theirs)
    assert differing(merged.model, expected)
    merged.merge(ours)
    assert differing(merged.model, expected) == []


@pytest.mark.usefixtures("kernels")
def test_task_vectors_of_fewer_numbers_than_are_kept(
    llama: Path, tmp_path: Path, tokenizer: Any
) -> None:
    base = AutoModelForCausalLM.from_pretrained(llama / "base").state_dict()
    for name in ("base", "one", "two"):
        model = AutoModelForCausalLM.from_pretrained(llama / name)
        for key, tensor in model.state_dict().items():
            if "layers.0" in key:  # the same as the base's
                tensor.copy_(base[key])
            elif "layers.1" in key:  # every fifth number its own
                other = torch.arange(tensor.numel()).view_as(tensor) % 5 > 0
                tensor[other] = base[key][other]
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    config = merge_config(tmp_path, "ties")
    merged = MergedModel(config, OPTIONS)
    merged.merge(config)
    assert differing(merged.model, on_disk(config, tmp_path / "out")) == []


@pytest.mark.parametrize("count", [1, 2, 3, 17])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", KERNELS)
def test_compiled_kernels_give_the_same_bits(method: str, dtype: torch.dtype, count: int) -> None:
    torch.manual_seed(0)
    base, *tensors = (
        torch.randn(count + 1, 70_001).mul(0.02).where(torch.rand(70_001) < 0.8, -0.0).bfloat16()
    )
    tensors[0][1:5000] = base[1:5000]
    if method != "ties":  # which asks for signs, and NaN has any
        tensors[-1][7] = torch.nan
    models = [ModelReference.parse(str(index)) for index in range(count)]
    inputs = (models, tensors) if method == "linear" else (models, tensors, base)
    plain, compiled = KERNELS[method](*inputs), COMPILED[method](*inputs)
    for normalize, scale, density in ((True, 1.0, 0.3), (False, 0.7, 1.0), (True, 0.7, 0.0)):
        own = {
            model: {"weight": 0.9 - 0.35 * index, "density": min(1.0, density + 0.1 * (index % 3))}
            for index, model in enumerate(models)
        }
        found = []
        for kernel in (plain, compiled):
            target = torch.empty(70_001, dtype=dtype)
            kernel.merge(target, {"normalize": normalize, "lambda": scale}, own)
            found.append(target)
        assert torch.equal(found[0].isnan(), found[1].isnan())
        assert torch.equal(*(each.nan_to_num(9.0) for each in found))
        assert torch.equal(*(each.nan_to_num(9.0).signbit() for each in found))


def test_compiled_kernels_leave_torchs_threads_alone(llama: Path) -> None:
    code = f"""
import torch
torch.set_num_threads(1)
from mergekit_align.evolve import merging
from test_merging import OPTIONS, Path, merge_config
merging.SMALL = 0
config = merge_config(Path({str(llama)!r}), "linear", base=False)
merging.MergedModel(config, OPTIONS).merge(config)
assert torch.get_num_threads() == 1, torch.get_num_threads()
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)


METHODS = sorted(method.spec.name for method in registered_methods())
ONE_MODEL = {"passthrough"}
NO_BASE = {"linear", "model_stock", "karcher"}
SECOND_ONLY = {"slerp", "nearswap", "arcee_fusion"}  # a base model and one other
OURS = {method.spec.name for method in OUR_METHODS}


@pytest.fixture(scope="module")
def statistics(llama: Path) -> Path:
    """Of both models and, on their samples, of the base: `one`, `base-one`, ..."""
    data = llama / "samples.jsonl"
    save_samples([Sample(prompt="Tell me.", response="No.", type="alignment")], data)
    out, kinds = llama / "statistics", ["gram", "importance", "fisher"]
    for name in ("one", "two"):
        collect_statistics(f"{llama}/{name}", Source([data]), out / name, kinds=kinds)  # type: ignore[arg-type]
        collect_statistics(
            f"{llama}/base", Source([data]), out / f"base-{name}", kinds=["importance"]
        )
    collect_propagated(config_of(llama, "regmean_plus"))
    return out


def config_of(directory: Path, method: str) -> MergeConfiguration:
    if method in ONE_MODEL:
        return merge_config(directory, method, base=False, count=1, parameters=None)
    if method in OURS:
        spec = get(method).spec
        roles = {"one": "aligned", "two": "expert"}
        if method == "safemerge":
            roles["three"] = "safe"
        models = []
        for name, role in roles.items():
            given = {
                "role": role,
                "weight": 0.8,
                "statistics": f"{directory}/statistics/{name}",
                "base_statistics": f"{directory}/statistics/base-{name}",
            }
            known = {p.name for p in spec.parameters} & given.keys()
            models.append(
                {"model": f"{directory}/{name}", "parameters": {key: given[key] for key in known}}
            )
        base = spec.contract.base == BasePolicy.REQUIRED
        return merge_config(directory, method, base=base, models=models, parameters=None)
    count = 1 if method in SECOND_ONLY else 2
    return merge_config(directory, method, base=method not in {"linear", "karcher"}, count=count)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_again_and_again(
    method: str, llama: Path, statistics: Path, tmp_path: Path
) -> None:
    config = config_of(llama, method)
    merged = MergedModel(config, OPTIONS)
    expected = on_disk(config, tmp_path / "out")
    for _ in range(2):
        merged.merge(config)
        assert differing(merged.model, expected) == []


@pytest.mark.usefixtures("kernels")
def test_slices_granularity_and_filters(llama: Path, tmp_path: Path) -> None:
    def sources(layer: int, weights: tuple[float, float]) -> dict[str, Any]:
        return {
            "sources": [
                {
                    "model": str(llama / name),
                    "layer_range": [layer, layer + 1],
                    "parameters": {
                        "weight": [{"filter": "self_attn", "value": weight}, {"value": weight / 2}]
                    },
                }
                for name, weight in zip(("one", "two"), weights, strict=True)
            ]
            + [{"model": str(llama / "base"), "layer_range": [layer, layer + 1]}]
        }

    def config(*weights: tuple[float, float], layers: tuple[int, ...]) -> MergeConfiguration:
        slices = [sources(*each) for each in zip(layers, weights, strict=True)]
        return merge_config(llama, "task_arithmetic", models=None, slices=slices)

    first = config((0.3, 1.1), (0.8, 0.0), (0.5, 0.4), layers=(0, 1, 0))
    second = config((0.9, 1.2), (0.8, 0.0), (0.1, 0.4), layers=(0, 1, 0))
    merged = MergedModel(first, OPTIONS)
    for number, each in enumerate((first, second, first)):
        merged.merge(each)
        assert differing(merged.model, on_disk(each, tmp_path / str(number))) == []


@pytest.mark.parametrize(
    "weight",
    [[0.2, 0.9], [{"filter": "mlp", "value": [0.2, 0.9]}, {"value": 0.5}]],
    ids=["alone", "of a filter"],
)
def test_numbers_spread_over_the_layers(weight: list[Any], llama: Path, tmp_path: Path) -> None:
    models = [
        {"model": str(llama / "one"), "parameters": {"weight": weight}},
        {"model": str(llama / "two"), "parameters": {"weight": 0.7}},
    ]
    config = merge_config(llama, "task_arithmetic", models=models)
    merged = MergedModel(config, OPTIONS)
    merged.merge(config)
    assert differing(merged.model, on_disk(config, tmp_path / "out")) == []
    weights = {
        merge.own[ModelReference.parse(str(llama / "one"))]["weight"]
        for merge in merged.resolve(config)
        if "mlp" in merge.weight.name
    }
    assert len(weights) == merged.model.config.num_hidden_layers > 1


@pytest.mark.usefixtures("kernels")
def test_tokenizers_are_aligned(llama: Path, tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.add_tokens(["<new>"])
    make_models(tmp_path, "llama", tokenizer)
    models = [
        {"model": str(directory / "one"), "parameters": {"weight": 0.5}}
        for directory in (llama, tmp_path)
    ]
    config = merge_config(
        llama, "linear", base=False, models=models, tokenizer_source="union", parameters=None
    )
    merged = MergedModel(config, OPTIONS)
    merged.merge(config)
    assert "<new>" in merged.tokenizer.get_vocab()
    assert differing(merged.model, on_disk(config, tmp_path / "out")) == []
