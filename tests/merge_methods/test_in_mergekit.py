"""Our methods as a user of mergekit meets them: in YAML, in a genome, and when a config is wrong."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods import get
from mergekit.merge_methods.base import BasePolicy
from mergekit.options import MergeOptions
from mergekit.scripts import evolve, run_yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mergekit_align.cli import evolve as cli_evolve
from mergekit_align.demo import build_world
from mergekit_align.demo.models import Architecture
from mergekit_align.merge_methods.methods import METHODS
from mergekit_align.merge_methods.roles import MergeConfigError
from mergekit_align.samples import SampleType
from mergekit_align.statistics.collect import Source, collect_statistics
from mergekit_align.statistics.files import Kind
from mergekit_align.statistics.propagate import collect_propagated

NAMES = [method.spec.name for method in METHODS]


def take_statistics(world: Path, out: Path) -> Path:
    """All statistics of the parents, and of the base on their samples: `aligned`, `base-expert-a`."""
    source = Source([world / "data" / "validation.jsonl"], limit=4)
    types: dict[str, list[SampleType]] = {"aligned": ["alignment", "benign"], "expert-a": ["task"]}
    for name, own in types.items():
        kinds: list[Kind] = ["gram", "importance", "fisher"]
        collect_statistics(f"{world}/{name}", source, out / name, kinds=kinds, types=own)
        collect_statistics(
            f"{world}/base", source, out / f"base-{name}", kinds=["importance"], types=own
        )
    models = [
        {"model": f"{world}/{name}", "parameters": {"statistics": f"{out}/{name}"}}
        for name in types
    ]
    plus = {"merge_method": "regmean_plus", "models": models}
    collect_propagated(MergeConfiguration.model_validate(plus))
    return out


def content_of(
    world: Path,
    statistics: Path,
    method: str,
    roles: dict[str, str | None] | None = None,
    **parameters: Any,
) -> dict[str, Any]:
    """A config of a method of ours on a demo world."""
    if roles is None:
        roles = {"aligned": "aligned", "expert-a": "expert"}
        if method == "safemerge":
            roles["expert-b"] = "safe"
    known = {parameter.name for parameter in get(method).spec.parameters}
    models = [{"model": f"{world}/{name}", "parameters": {}} for name in roles]
    for entry, (name, role) in zip(models, roles.items(), strict=True):
        given = {
            "role": role,
            "statistics": f"{statistics}/{name}",
            "base_statistics": f"{statistics}/base-{name}",
        }
        entry["parameters"] = {key: given[key] for key in known & set(given) if given[key]}
    content = {
        "merge_method": method,
        "base_model": f"{world}/base",
        "models": models,
        "dtype": "float32",
        "parameters": parameters,
    }
    if get(method).spec.contract.base != BasePolicy.REQUIRED:
        del content["base_model"]
    return content


@pytest.fixture(scope="module")
def statistics(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return take_statistics(world, tmp_path_factory.mktemp("statistics"))


@pytest.fixture
def config(world: Path, tmp_path: Path, statistics: Path) -> Callable[..., Path]:
    """Writes a config of a method of ours on the demo world, its parameters changed."""

    def write(method: str, roles: dict[str, str | None] | None = None, **parameters: Any) -> Path:
        path = tmp_path / "merge.yml"
        path.write_text(yaml.safe_dump(content_of(world, statistics, method, roles, **parameters)))
        return path

    return write


@pytest.mark.parametrize("method", NAMES)
def test_a_config_merges(config: Callable[..., Path], tmp_path: Path, method: str) -> None:
    result = CliRunner().invoke(run_yaml.main, [str(config(method)), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "mistral"])
def test_every_method_merges_other_architectures(
    architecture: Architecture, tmp_path: Path
) -> None:
    world = tmp_path / "world"
    build_world(world, scale="smoke", architecture=architecture)
    statistics = take_statistics(world, tmp_path / "statistics")
    expected = load_file(world / "aligned" / "model.safetensors")
    for method in NAMES:
        content = content_of(world, statistics, method)
        out = tmp_path / method
        run_merge(MergeConfiguration.model_validate(content), str(out), MergeOptions())
        tensors = load_file(out / "model.safetensors")
        assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in expected.items()}
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
        AutoModelForCausalLM.from_pretrained(out)


def test_filters_give_parameters_by_tensor(
    config: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    gamma = [{"filter": "mlp", "value": 0.0}, {"value": 1.0}]
    content = yaml.safe_load(config("resta", gamma=gamma).read_text())
    run_merge(MergeConfiguration.model_validate(content), str(tmp_path / "out"), MergeOptions())
    merged, expert, aligned, base = (
        load_file(Path(place) / "model.safetensors")
        for place in (tmp_path / "out", world / "expert-a", world / "aligned", world / "base")
    )
    name = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(merged[name], expert[name].float())
    name = "model.layers.1.self_attn.q_proj.weight"
    expected = expert[name].float() + aligned[name].float() - base[name].float()
    torch.testing.assert_close(merged[name], expected)


def test_safe_lora_projects_the_lowest_cosines(
    config: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    base, aligned, expert = (
        load_file(world / name / "model.safetensors") for name in ("base", "aligned", "expert-a")
    )
    projections, cosines = {}, {}
    for name, start in base.items():
        if start.ndim == 2 and "embed" not in name and "lm_head" not in name:
            v = (aligned[name].float() - start.float()).double()
            update = (expert[name].float() - start.float()).double()
            projections[name] = aligned[name].double() + v @ v.T @ update / v.norm()
            cosines[name] = float(
                torch.cosine_similarity((v @ v.T @ update).flatten(), update.flatten(), dim=0)
            )
    lowest = sorted(cosines, key=cosines.__getitem__)[:3]
    path = config("safe_lora", lowest=3, origin="base")
    run_merge(
        MergeConfiguration.model_validate(yaml.safe_load(path.read_text())),
        str(tmp_path / "out"),
        MergeOptions(),
    )
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, projected in projections.items():
        whole = aligned[name].double() + expert[name].double() - base[name].double()
        expected = projected if name in lowest else whole
        torch.testing.assert_close(merged[name].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "roles", "message"),
    [
        (
            "resta",
            {"aligned": "aligned", "expert-a": None},
            "found role None; expected role aligned",
        ),
        ("resta", {"aligned": "expert", "expert-a": "expert"}, "found no model of role aligned"),
        ("resta", {"aligned": "aligned"}, "found no model of role expert"),
        (
            "safemerge",
            {"aligned": "aligned", "expert-a": "expert", "expert-b": "expert"},
            "found no model of role safe",
        ),
        (
            "lox",
            {"aligned": "aligned", "expert-a": "aligned"},
            "found role aligned for",
        ),
        ("resta", {"aligned": "aligned", "expert-a": "skilled"}, "found role 'skilled'"),
    ],
)
def test_a_role_that_is_wrong_is_one_line_before_any_weight_is_read(
    config: Callable[..., Path],
    tmp_path: Path,
    method: str,
    roles: dict[str, str | None],
    message: str,
) -> None:
    path = config(method, roles)
    result = CliRunner().invoke(run_yaml.main, [str(path), str(tmp_path / "out")])
    assert result.exit_code == 2
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert line.startswith("Error: models: ")
    assert message in line
    assert not list(tmp_path.rglob("*.safetensors"))


def test_slices_are_checked_too(config: Callable[..., Path], world: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(config("resta", {"aligned": None, "expert-a": "expert"}).read_text())
    sources = [{**model, "layer_range": [0, 4]} for model in content.pop("models")]
    content["slices"] = [{"sources": sources}]
    with pytest.raises(MergeConfigError, match=r"^slices\[0\].sources: .*found role None"):
        run_merge(MergeConfiguration.model_validate(content), str(tmp_path), MergeOptions())


def refused(path: Path, tmp_path: Path) -> str:
    """The one line that a config which cannot be merged gives, nothing being written."""
    result = CliRunner().invoke(run_yaml.main, [str(path), str(tmp_path / "out")])
    assert result.exit_code == 2, result.output
    assert not list(tmp_path.rglob("out/*.safetensors"))
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    return line


def changed(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("method", "parameter", "value", "expected"),
    [
        ("safe_lora", "tau", 1.5, "less than or equal to 1"),
        ("safemerge", "alpha", -0.1, "greater than 0"),
        ("lox", "rank", 0, "greater than or equal to 1"),
        ("resta", "gamma", "much", "a valid number"),
        ("resta", "gamma", [{"filter": "mlp", "value": "much"}, {"value": 1.0}], "a valid number"),
        ("lssf", "eta", [0.5, 1.5], "less than or equal to 1"),
        ("regmean", "off_diagonal", 2.0, "less than or equal to 1"),
        ("fisher", "task_weight", -1.0, "greater than or equal to 0"),
    ],
)
def test_a_value_out_of_range_is_one_line(
    config: Callable[..., Path],
    tmp_path: Path,
    method: str,
    parameter: str,
    value: Any,
    expected: str,
) -> None:
    line = refused(config(method, **{parameter: value}), tmp_path)
    assert line.startswith(f"Error: parameters: {parameter}: found ")
    assert expected in line


@pytest.mark.parametrize("method", ["resta", "led"])
def test_a_base_that_is_missing_is_one_line(
    config: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    path = changed(config(method), lambda content: content.pop("base_model"))
    assert "base_model: found none" in refused(path, tmp_path)


def test_a_tensor_of_one_model_only_is_one_line(
    config: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    other = tmp_path / "aligned"
    shutil.copytree(world / "aligned", other)
    tensors = load_file(other / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, other / "model.safetensors", {"format": "pt"})

    def change(content: dict[str, Any]) -> None:
        content["models"][0]["model"] = str(other)

    line = refused(changed(config("resta"), change), tmp_path)
    assert "found tensor model.norm.weight in" in line


class TestStatistics:
    @pytest.mark.parametrize("method", ["regmean", "regmean_plus", "fisher", "led"])
    def test_of_another_model_are_refused(
        self, config: Callable[..., Path], statistics: Path, tmp_path: Path, method: str
    ) -> None:
        def change(content: dict[str, Any]) -> None:
            content["models"][0]["parameters"]["statistics"] = f"{statistics}/expert-a"

        line = refused(changed(config(method), change), tmp_path)
        assert "found statistics of another model" in line

    def test_of_other_samples_are_refused(
        self, config: Callable[..., Path], statistics: Path, tmp_path: Path
    ) -> None:
        def change(content: dict[str, Any]) -> None:
            content["models"][1]["parameters"]["base_statistics"] = f"{statistics}/base-aligned"

        line = refused(changed(config("led"), change), tmp_path)
        assert "found statistics of other samples" in line

    def test_that_are_missing_are_refused(
        self, config: Callable[..., Path], tmp_path: Path
    ) -> None:
        def change(content: dict[str, Any]) -> None:
            content["models"][0]["parameters"]["statistics"] = str(tmp_path / "none")

        line = refused(changed(config("fisher"), change), tmp_path)
        assert "found no statistics of kind fisher" in line

    def test_that_are_cut_short_are_refused(
        self, config: Callable[..., Path], statistics: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(statistics / "expert-a", tmp_path / "expert-a")
        file = tmp_path / "expert-a" / "task.gram.safetensors"
        file.write_bytes(file.read_bytes()[:-100])

        def change(content: dict[str, Any]) -> None:
            content["models"][1]["parameters"]["statistics"] = str(tmp_path / "expert-a")

        line = refused(changed(config("regmean"), change), tmp_path)
        assert "task.gram.safetensors: found no whole file of statistics" in line

    def test_of_a_layer_that_a_slice_moves_are_refused(
        self, config: Callable[..., Path], tmp_path: Path
    ) -> None:
        def change(content: dict[str, Any]) -> None:
            models = content.pop("models")
            content["slices"] = [
                {"sources": [{**model, "layer_range": [1, 2]} for model in models]}
            ]

        line = refused(changed(config("regmean"), change), tmp_path)
        assert "layer_range: found [1, 2]; expected one that begins at 0" in line


class TestInAGenome:
    @pytest.fixture
    def genome(self, write_config: Callable[..., Path], world: Path) -> Callable[..., Path]:
        def write(**roles: str) -> Path:
            named = {f"{world}/{name.replace('_', '-')}": role for name, role in roles.items()}
            return write_config(
                genome={"merge_method": "resta"},
                align={"roles": named, "in_memory": True, "save_final_model": False},
            )

        return write

    @pytest.mark.parametrize(
        ("roles", "message"),
        [
            ({}, "found role None"),
            ({"aligned": "aligned"}, "found role None"),
            ({"aligned": "aligned", "expert_b": "expert"}, "found no model; expected one of"),
            ({"aligned": "aligned", "expert_a": "skilled"}, "align.roles"),
        ],
    )
    def test_roles_are_checked_first(
        self, genome: Callable[..., Path], roles: dict[str, str], message: str
    ) -> None:
        result = CliRunner().invoke(evolve.main, [str(genome(**roles))])
        assert result.exit_code == 2, result.output
        assert message in result.output
        assert len(result.output.splitlines()) == 1

    def test_statistics_are_checked_first(
        self, write_config: Callable[..., Path], world: Path, statistics: Path
    ) -> None:
        places = {f"{world}/aligned": str(statistics / "expert-a")}
        path = write_config(genome={"merge_method": "align_adaptive"}, align={"statistics": places})
        result = CliRunner().invoke(evolve.main, [str(path)])
        assert result.exit_code == 2, result.output
        assert "found statistics of another model" in result.output
        assert len(result.output.splitlines()) == 1

    def test_our_search_finds_parameters_of_our_method(
        self, write_config: Callable[..., Path], world: Path, statistics: Path, tmp_path: Path
    ) -> None:
        places = {f"{world}/{name}": str(statistics / name) for name in ("aligned", "expert-a")}
        path = write_config(genome={"merge_method": "align_adaptive"}, align={"statistics": places})
        result = CliRunner().invoke(cli_evolve.main, [str(path)])
        assert result.exit_code == 0, result.output
        best = yaml.safe_load((tmp_path / "evolved" / "best_config.yml").read_text())
        (piece,) = best["slices"]
        assert set(piece["parameters"]) == {"interference", "alignment_weight"}
        assert {s["parameters"]["statistics"] for s in piece["sources"] if "parameters" in s} == {
            *places.values()
        }

    @pytest.mark.slow
    def test_a_search_gives_every_candidate_its_roles(
        self, genome: Callable[..., Path], tmp_path: Path
    ) -> None:
        path = genome(expert_a="expert", aligned="aligned")
        command = [str(Path(sys.executable).with_name("mergekit-evolve")), str(path)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
        best = yaml.safe_load((tmp_path / "evolved" / "best_config.yaml").read_text())
        sources = best["slices"][0]["sources"]
        roles = {
            Path(s["model"]).name: s["parameters"]["role"] for s in sources if "parameters" in s
        }
        assert sorted(roles.values()) == ["aligned", "expert"]
