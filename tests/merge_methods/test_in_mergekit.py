"""Our methods as a user of mergekit meets them: in YAML, in a genome, and when a config is wrong."""

from __future__ import annotations

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
from mergekit.options import MergeOptions
from mergekit.scripts import evolve, run_yaml
from safetensors.torch import load_file

from mergekit_align.merge_methods import METHODS
from mergekit_align.merge_methods.roles import MergeConfigError

NAMES = [method.spec.name for method in METHODS]


@pytest.fixture
def config(world: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a config of a method of ours on the demo world, its parameters changed."""

    def write(method: str, roles: dict[str, str | None] | None = None, **parameters: Any) -> Path:
        if roles is None:
            roles = {"aligned": "aligned", "expert-a": "expert"}
            if method == "safemerge":
                roles["expert-b"] = "safe"
        models = [
            {"model": f"{world}/{name}", **({"parameters": {"role": role}} if role else {})}
            for name, role in roles.items()
        ]
        content = {
            "merge_method": method,
            "base_model": f"{world}/base",
            "models": models,
            "dtype": "float32",
            "parameters": parameters,
        }
        path = tmp_path / "merge.yml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.mark.parametrize("method", NAMES)
def test_a_config_merges(config: Callable[..., Path], tmp_path: Path, method: str) -> None:
    result = CliRunner().invoke(run_yaml.main, [str(config(method)), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


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
