"""Building a demo world, at smoke scale: the same files as the full one, in seconds."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_align.cli.demo import main
from mergekit_align.demo import build_world
from mergekit_align.demo.corpus import MODELS
from mergekit_align.demo.models import ARCHITECTURES
from mergekit_align.errors import InputError
from mergekit_align.samples import load_samples


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "world"
    build_world(directory, scale="smoke")
    return directory


def digests(world: Path) -> dict[str, str]:
    """Of every file but the record of how long it took."""
    return {
        str(file.relative_to(world)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(world.rglob("*"))
        if file.is_file() and file.name != "world.json"
    }


def test_a_finished_world_is_complete(world: Path) -> None:
    record = json.loads((world / "world.json").read_text())
    assert list(record["models"]) == list(MODELS)
    assert all({"seconds", "loss"} <= set(entry) for entry in record["models"].values())
    assert {entry.name for entry in world.iterdir()} == {*MODELS, "data", "world.json"}
    for split in ("train", "validation", "test"):
        assert {s.type for s in load_samples(world / "data" / f"{split}.jsonl")} == {
            "alignment",
            "task",
            "benign",
        }


def test_models_stop_at_the_end_of_the_turn(world: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "aligned")
    model = AutoModelForCausalLM.from_pretrained(world / "aligned", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.config.max_position_embeddings == 512
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert tokenizer.pad_token not in (tokenizer.eos_token, None)


def test_a_finished_world_is_left_alone(world: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in world.rglob("*")}
    build_world(world, scale="smoke")
    assert {file: file.stat().st_mtime_ns for file in world.rglob("*")} == before


def test_a_resumed_build_gives_the_same_files(world: Path, tmp_path: Path) -> None:
    resumed = tmp_path / "resumed"
    shutil.copytree(world, resumed)
    # As if the build had been killed while it saved expert-b.
    record = json.loads((resumed / "world.json").read_text())
    for name in ("expert-b", "guard"):
        del record["models"][name]
    (resumed / "world.json").unlink()
    (resumed / "building.json").write_text(json.dumps(record))
    (resumed / "expert-b").rename(resumed / ".expert-b")
    shutil.rmtree(resumed / "guard")
    (resumed / "data" / "test.jsonl").unlink()
    build_world(resumed, scale="smoke")
    assert digests(resumed) == digests(world)
    assert not (resumed / "building.json").exists()


def test_a_writer_comes_on_demand_and_changes_nothing_else(world: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(world, other)
    build_world(other, scale="smoke", writer=True)
    found = digests(other)
    assert {file for file in found if file not in digests(world)} == {
        f"writer/{file.relative_to(world / 'base')}" for file in (world / "base").iterdir()
    }
    assert {file: found[file] for file in digests(world)} == digests(world)
    before = {file: file.stat().st_mtime_ns for file in other.rglob("*")}
    build_world(other, scale="smoke", writer=True)
    assert {file: file.stat().st_mtime_ns for file in other.rglob("*")} == before


def test_the_same_seed_gives_the_same_files(world: Path, tmp_path: Path) -> None:
    build_world(tmp_path / "again", scale="smoke")
    assert digests(tmp_path / "again") == digests(world)


def test_the_third_model_may_come_later(world: Path, tmp_path: Path) -> None:
    build_world(tmp_path / "other", scale="smoke", third=False)
    assert not (tmp_path / "other" / "expert-b").exists()
    build_world(tmp_path / "other", scale="smoke")
    assert digests(tmp_path / "other") == digests(world)


def test_other_settings_in_the_same_directory_are_refused_in_one_line(world: Path) -> None:
    result = CliRunner().invoke(main, [str(world), "--scale", "smoke", "--seed", "1"])
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
    assert "seed 0" in result.output
    assert "seed 1" in result.output


def test_other_files_in_the_directory_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="found other files"):
        build_world(tmp_path, scale="smoke")
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("settings", [{"architecture": "gpt9"}, {"scale": "huge"}])
def test_an_unknown_setting_names_the_known_ones(tmp_path: Path, settings: dict[str, str]) -> None:
    with pytest.raises(InputError, match="expected one of"):
        build_world(tmp_path / "world", **settings)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mergekit_merges_every_architecture(architecture: str, world: Path, tmp_path: Path) -> None:
    if architecture != "llama":
        world = tmp_path / "world"
        build_world(world, scale="smoke", architecture=architecture)  # type: ignore[arg-type]
    for method in ("linear", "ties"):
        models = [
            {"model": str(world / name), "parameters": {"weight": 0.5, "density": 0.5}}
            for name in ("aligned", "expert-a")
        ]
        config = {"merge_method": method, "models": models, "dtype": "bfloat16"}
        if method == "linear":
            for model in models:
                model["parameters"] = {"weight": 0.5}
        else:
            config["base_model"] = str(world / "base")
        merged = tmp_path / method
        run_merge(
            MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(config))),
            str(merged),
            MergeOptions(quiet=True, copy_tokenizer=True),
        )
        model = AutoModelForCausalLM.from_pretrained(merged)
        base = AutoModelForCausalLM.from_pretrained(world / "base")
        assert model.state_dict().keys() == base.state_dict().keys()
        assert model(torch.tensor([[0, 3, 300]])).logits.isfinite().all()
