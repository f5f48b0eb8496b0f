"""Racing: what does not lead stops early, what wins has seen every sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mergekit_align.cli.evolve import main
from mergekit_align.evolve import EvolveConfig, read_config, search
from mergekit_align.evolve.racing import MISTAKES, Field, Race, Standing
from mergekit_align.evolve.ranking import best_of
from mergekit_align.evolve.sample_values import SampleValues
from mergekit_align.evolve.strata import SHARES, stratify
from mergekit_align.evolve.study import Evaluation
from mergekit_align.report.study_file import read_study

WriteConfig = Callable[..., Path]

ALIGNMENT = "response_alignment", "logprob,none"
TASK = "response_task", "logprob,none"
TASKS = [
    {"name": "response_alignment", "metric": "logprob,none", "weight": 1.0},
    {"name": "response_task", "metric": "logprob,none", "weight": 0.3},
]
TOKENS = {"response_alignment": 30.0, "response_task": 30.0}
SIZE = 400


@pytest.fixture
def config(write_config: WriteConfig) -> EvolveConfig:
    return read_config(write_config(tasks=TASKS, align={"racing": True}))


def values(rng: np.random.Generator, better: float = 0.0) -> SampleValues:
    """Of a few hard samples, and of many that all candidates do alike."""
    hard = rng.permutation(np.arange(SIZE) < SIZE / 10)
    return {
        each: np.where(hard, rng.normal(better - 2, 0.5, SIZE), -0.01) for each in (ALIGNMENT, TASK)
    }


def another(rng: np.random.Generator, rival: SampleValues, better: float) -> SampleValues:
    """A candidate that is better by a mean over all samples, in what is hard."""
    found = {}
    for metric, own in rival.items():
        noise = rng.normal(0, 1, SIZE) * -own
        found[metric] = own + noise - noise.mean() + better
    return found


def lost_after(config: EvolveConfig, rival: SampleValues, own: SampleValues) -> int | None:
    """After how many samples."""
    race = Race(config, Standing.of(rival, []), TOKENS)
    stages = range(len(race.slices) - 1)
    return next((race.samples(n) for n in stages if race.is_lost(own, n)), None)


def test_slices_have_every_sample_once_and_what_varies_first() -> None:
    spread = {"one": np.linspace(0, 1, 200) ** 8, "few": np.ones(5)}
    strata = stratify(spread, {"one": 1.0, "few": 1.0})
    for name, own in spread.items():
        places = np.concatenate([each.places for each in strata if each.task == name])
        assert sorted(places) == list(range(len(own)))
    assert sum(each.seen[0] for each in strata) < 205 / 4
    assert all(each.seen[-1] == len(each.places) for each in strata)
    assert all(list(each.seen) == sorted(each.seen) for each in strata)
    first, *_, last = [each for each in strata if each.task == "one"]
    assert set(first.places) == set(range(190, 200))
    assert first.seen[0] / len(first.places) > 10 * last.seen[0] / len(last.places)


def test_of_costly_samples_fewer_are_read_at_first() -> None:
    spread = {"short": np.linspace(0, 1, 200) ** 8, "long": np.linspace(0, 1, 200) ** 8}
    cost = {"short": 10.0, "long": 160.0}
    strata = stratify(spread, cost)
    seen = {name: sum(each.seen[1] for each in strata if each.task == name) for name in spread}
    assert seen["short"] > 1.5 * seen["long"]
    spent = sum(cost[name] * count for name, count in seen.items())
    assert spent == pytest.approx(200 * (10 + 160) * SHARES[1], rel=0.1)


def test_what_is_much_worse_stops_first(config: EvolveConfig) -> None:
    rng = np.random.default_rng(0)
    rival = values(rng)
    assert (lost_after(config, rival, another(rng, rival, -1.0)) or SIZE) < 2 * SIZE / 6
    assert lost_after(config, rival, another(rng, rival, 1.0)) is None


def stopped(config: EvolveConfig, standing: Standing, lead: float) -> int:
    """Of 200 that are better by so many standard errors of the fitness's difference."""
    rng = np.random.default_rng(1)
    race = Race(config, standing, TOKENS)
    lost = 0
    for _ in range(200):
        own = another(rng, standing.rival, 0.0)
        differences = [own[each] - standing.rival[each] for each in (ALIGNMENT, TASK)]
        weighted = [t["weight"] * d for t, d in zip(TASKS, differences, strict=True)]  # type: ignore[operator]
        own[ALIGNMENT] += lead * float(sum(each.var() for each in weighted) / SIZE) ** 0.5
        lost += any(race.is_lost(own, n) for n in range(len(race.slices) - 1))
    return lost


def test_a_lead_that_the_samples_can_tell_is_hardly_ever_stopped(config: EvolveConfig) -> None:
    standing = Standing.of(values(np.random.default_rng(1)), [])
    # Just above one, what chance makes of the standard error itself decides.
    assert stopped(config, standing, 2.0) <= 200 * MISTAKES
    assert stopped(config, standing, 0.0) > 100  # as good is no lead


def test_nor_because_others_are_far_behind(config: EvolveConfig) -> None:
    """They are what is known of how much candidates differ, at a search's beginning."""
    rng = np.random.default_rng(1)
    rival = values(rng)
    far = another(rng, {metric: 20 * own for metric, own in rival.items()}, 0.0)
    assert stopped(config, Standing.of(rival, [far]), 2.0) <= 200 * MISTAKES


def test_each_generation_sees_other_samples_first(config: EvolveConfig) -> None:
    standing = Standing.of(values(np.random.default_rng(5)), [])
    one, again, other = (
        Race(config, standing._replace(generation=n), TOKENS).slices for n in (0, 0, 1)
    )
    assert one == again
    for name, places in one[0].items():
        assert places != other[0][name]
        assert len(places) == len(other[0][name])


def test_all_of_a_generation_see_the_same_though_the_rival_is_another(
    config: EvolveConfig,
) -> None:
    rng = np.random.default_rng(6)
    field = Field(config, generation=10)
    standings = []
    for number in range(12):
        samples = values(rng, better=float(number))
        field.add(evaluated(number, samples))
        assert field.standing is not None
        assert field.standing.rival is samples
        standings.append(field.standing)
    slices = [Race(config, each, TOKENS).slices for each in standings]
    assert slices[0] != slices[4]  # the first few tell how much candidates differ
    assert slices[4] == slices[8]
    assert slices[8] != slices[9] == slices[10] == slices[11]


def test_a_race_against_another_rival_judges_by_that_one(config: EvolveConfig) -> None:
    rng = np.random.default_rng(7)
    rival = values(rng)
    own, better = another(rng, rival, 0.5), another(rng, rival, 2.0)
    race = Race(config, Standing.of(rival, []), TOKENS)
    harder = race.against(better)
    assert harder.slices == race.slices
    assert not race.is_lost(own, 1)
    assert harder.is_lost(own, 1)


def evaluated(number: int, samples: SampleValues) -> Evaluation:
    weights = {(t["name"], t["metric"]): t["weight"] for t in TASKS}
    fitness = sum(weights[each] * own.mean() for each, own in samples.items())  # type: ignore[index,operator]
    return Evaluation(np.zeros(1), number, number + 1, (fitness,), (), {}, 0.0, 0, samples=samples)


def test_an_estimate_is_without_bias_and_nearer_than_the_samples_mean(config: EvolveConfig) -> None:
    rng = np.random.default_rng(2)
    rival = values(rng)
    race = Race(config, Standing.of(rival, []), TOKENS)
    places = race.slices[0]["response_task"]
    errors, plain = [], []
    for _ in range(200):
        own = another(rng, rival, -0.1)
        whole = own[TASK].mean()
        errors.append(race.estimate(own, 0)["response_task"]["logprob,none"] - whole)
        plain.append(rng.choice(own[TASK], len(places)).mean() - whole)
    assert abs(np.mean(errors)) < 0.1 * np.std(plain)
    assert np.std(errors) < 0.7 * np.std(plain)


class TestFloors:
    """They come before the fitness, as in the ranking."""

    def race(self, write_config: WriteConfig, least: float, rival: SampleValues) -> Race:
        path = write_config(
            tasks=TASKS, align={"racing": True, "floors": {"response_alignment:logprob": least}}
        )
        return Race(read_config(path), Standing.of(rival, []), TOKENS)

    def test_what_misses_them_is_lost_though_it_is_fitter(self, write_config: WriteConfig) -> None:
        rng = np.random.default_rng(0)
        rival = values(rng)
        own = another(rng, rival, -0.5)
        own[TASK] = rival[TASK] + 20
        race = self.race(write_config, float(rival[ALIGNMENT].mean()) - 0.01, rival)
        assert race.is_lost(own, 1)

    def test_what_misses_them_by_less_goes_on_though_it_is_less_fit(
        self, write_config: WriteConfig
    ) -> None:
        rng = np.random.default_rng(0)
        rival = values(rng)
        own = another(rng, rival, 0.5)
        own[TASK] = rival[TASK] - 20
        race = self.race(write_config, 0.0, rival)
        assert not race.is_lost(own, 1)


def raced(write_config: WriteConfig, storage: Path, **align: Any) -> EvolveConfig:
    path = write_config(
        tasks=TASKS, align={"searcher": "random", "racing": True, "max_fevals": 6, **align}
    )
    path.write_text(path.read_text().replace("limit: 8\n", "limit: 48\n"))
    # In float32 a sample's value does not depend on those that are read beside it.
    return read_config(path, storage=storage)._replace(dtype=torch.float32)


class TestSearch:
    def test_ends_with_what_the_exact_one_ends_with(
        self, write_config: WriteConfig, tmp_path: Path
    ) -> None:
        found = search(raced(write_config, tmp_path / "raced"))
        exact = search(raced(write_config, tmp_path / "exact", racing=False))
        for own, whole in zip(found.evaluations, exact.evaluations, strict=True):
            np.testing.assert_array_equal(own.genotype, whole.genotype)
            assert whole.stopped is None
            assert own.complete == (own.stopped is None)
            if own.complete:
                assert own.values == pytest.approx(whole.values, abs=1e-5)
        stopped = [each.stopped for each in found.evaluations if each.stopped is not None]
        assert stopped
        assert all(0 < each < 96 for each in stopped)
        assert found.best is not None
        assert exact.best is not None
        assert found.best.asked == exact.best.asked
        # An estimate may be higher than what is known.
        lucky = [
            each if each.complete else each._replace(values=(99.0,)) for each in found.evaluations
        ]
        assert best_of(found.config, lucky) is found.best
        record = read_study(tmp_path / "raced" / "study.journal")
        assert [each.evaluation.stopped for each in record.candidates] == [
            each.stopped for each in found.evaluations
        ]

    def test_resumed_is_the_uninterrupted_one(
        self, write_config: WriteConfig, tmp_path: Path
    ) -> None:
        whole = search(raced(write_config, tmp_path / "whole", max_fevals=14))
        for count in (3, 12, 14):
            config = raced(write_config, tmp_path / "parts", max_fevals=count)
            parts = search(config, resume=True)
        for one, other in zip(whole.evaluations, parts.evaluations, strict=True):
            np.testing.assert_array_equal(one.genotype, other.genotype)
            assert (one.values, one.stopped) == (other.values, other.stopped)
        field = Field(whole.config, generation=10)
        for each in whole.evaluations[:12]:
            field.add(each)
        assert field.standing is not None
        assert field.standing.generation == 1
        assert any(each.stopped for each in whole.evaluations[10:])


@pytest.mark.parametrize(
    ("align", "tasks", "line"),
    [
        ({"searcher": "gradient"}, TASKS, "align.racing: found it with the searcher gradient"),
        ({"objectives": ["response_task"]}, TASKS, "align.racing: found it with `objectives`"),
        ({}, [*TASKS, "plain"], "align.racing: found it with the task plain, whose samples have"),
    ],
)
def test_bad_input_is_one_line(
    align: dict[str, Any],
    tasks: list[Any],
    line: str,
    write_config: WriteConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "plain.yaml").write_text(
        "task: plain\ndataset_path: json\ndataset_kwargs: {data_files: plain.jsonl}\n"
        "test_split: train\noutput_type: multiple_choice\ndoc_to_text: q\n"
        "doc_to_choice: [a, b]\ndoc_to_target: 0\nmetric_list: [{metric: acc}]\n"
    )
    (tmp_path / "plain.jsonl").write_text('{"q": "which"}\n')
    monkeypatch.chdir(tmp_path)
    path = write_config(
        tasks=tasks, align={"racing": True, "task_search_path": [str(tmp_path)], **align}
    )
    result = CliRunner().invoke(main, [str(path)])
    assert result.exit_code == 2, result.output
    assert f"{path}: {line}" in result.output.splitlines()[-1]


@pytest.mark.slow
def test_workers_race_too(write_config: WriteConfig, tmp_path: Path, cluster: None) -> None:
    """Of so many some are far worse than one that was scored before them, whoever was first."""
    found = search(raced(write_config, tmp_path / "raced", max_fevals=24), workers=2)
    assert sorted(each.asked for each in found.evaluations) == list(range(24))
    assert all(each.failure is None for each in found.evaluations)
    assert any(each.stopped is not None for each in found.evaluations)
    assert found.best is not None
    assert found.best.complete
