from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_align.errors import InputError
from mergekit_align.samples import Sample, load_samples, save_samples, split_samples

SAMPLES = [
    Sample(prompt=f"p{i % 40}", response=f"r{i}", type=kind, category=f"c{i % 3}")
    for i, kind in enumerate(["alignment", "task", "benign"] * 40)
]


@pytest.mark.parametrize("name", ["s.jsonl", "s.json", "saved"])
def test_samples_come_back_as_they_were_saved(tmp_path: Path, name: str) -> None:
    save_samples(SAMPLES, tmp_path / name)
    assert load_samples(tmp_path / name) == SAMPLES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found no samples"),
        (b"\xff\xfe{}", "not UTF-8"),
        (
            b'{"prompt": "a", "response": "b", "type": "task"}\n{"prompt"\n',
            ":2: found text that is not JSON",
        ),
        (b'{"prompt": "a", "type": "task"}', ":1: response: found nothing"),
        (b'{"prompt": "a", "response": "b", "type": "taks"}', "did you mean 'task'"),
        (
            b'{"prompt": 3, "response": "b", "type": "task"}',
            ":1: prompt: found 3; expected a string",
        ),
        (b"[1]", "item 0: found int"),
    ],
)
def test_a_bad_file_is_named_with_line_and_field(
    tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "s.jsonl"
    file.write_bytes(content)
    with pytest.raises(InputError) as error:
        load_samples(file)
    assert message in str(error.value)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_samples(tmp_path / "nothing.jsonl")


def test_no_prompt_is_in_two_splits_and_nothing_is_lost() -> None:
    splits = split_samples(SAMPLES, {"train": 0.5, "validation": 0.25, "test": 0.25}, seed=1)
    prompts = [{sample.prompt for sample in part} for part in splits.values()]
    assert sum(len(part) for part in splits.values()) == len(SAMPLES)
    assert sum(len(p) for p in prompts) == len(set.union(*prompts))


def test_a_split_depends_on_the_seed_and_not_on_the_order() -> None:
    def train(samples: list[Sample], seed: int) -> set[str]:
        parts = split_samples(samples, {"train": 0.5, "test": 0.5}, seed=seed)
        return {sample.prompt for sample in parts["train"]}

    assert train(SAMPLES, 1) == train(SAMPLES[::-1], 1)
    assert train(SAMPLES, 1) != train(SAMPLES, 2)


def test_fractions_must_sum_to_one() -> None:
    with pytest.raises(InputError, match="sum to 1"):
        split_samples(SAMPLES, {"train": 0.5})
