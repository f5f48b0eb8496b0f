"""One conformance suite, which every searcher passes, and what each is for."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from mergekit_align.align_section import AlignSection
from mergekit_align.evolve.genes import Gene
from mergekit_align.evolve.searchers import (
    BY_GRADIENT,
    MULTI_OBJECTIVE,
    SEARCHERS,
    Outcome,
    Searcher,
    Space,
    make_searcher,
)

GENES = [Gene("a", 0.0, 2.0, 1.0), Gene("b", -1.0, 1.0, 0.5), Gene("c", 0.0, 1.0, 1.0)]
TARGET = np.array([0.4, -0.2, 0.7])
CLIMBERS = sorted({*SEARCHERS} - {"grid", "random"})


def make(name: str, seed: int = 0, **space: Any) -> Searcher:
    section = AlignSection(random_seed=seed, grid_points=4, force_population_size=6)
    return make_searcher(name, Space(GENES, **space), section)


def outcome(x: Any, *, floor: float | None = None) -> Outcome:
    """The nearer to the target the better; with a floor, `a` must be at least that."""
    values = (-float(((x - TARGET) ** 2).sum()),)
    gradients = [-2 * (x - TARGET)]
    if floor is None:
        return Outcome(values, (), np.array(gradients))
    return Outcome(values, (floor - float(x[0]),), np.array([*gradients, [-1.0, 0.0, 0.0]]))


def run(searcher: Searcher, count: int, **options: Any) -> list[tuple[Any, Outcome]]:
    done = []
    for _ in range(count):
        x = searcher.ask()
        if x is None:
            break
        done.append((x, outcome(x, **options)))
        searcher.tell(*done[-1])
    return done


@pytest.mark.parametrize("name", SEARCHERS)
class TestEverySearcher:
    def test_stays_within_the_bounds(self, name: str) -> None:
        for x, _ in run(make(name), 40):
            assert all(gene.low <= value <= gene.high for gene, value in zip(GENES, x, strict=True))

    def test_repeats_itself(self, name: str) -> None:
        first = run(make(name), 30)
        np.random.seed(5)  # what others do to the global generator is nothing to it
        again = run(make(name), 30)
        assert len(first) == len(again)
        for (one, _), (other, _) in zip(first, again, strict=True):
            np.testing.assert_array_equal(one, other)

    def test_survives_candidates_that_fail(self, name: str) -> None:
        searcher = make(name)
        asked = 0
        for number in range(30):
            x = searcher.ask()
            if x is None:
                break
            asked += 1
            searcher.tell(x, Outcome(None) if number % 3 == 0 else outcome(x))
        assert asked

    def test_may_be_asked_ahead_and_told_in_any_order(self, name: str) -> None:
        searcher = make(name)
        pending = []
        told = 0
        while told < 60:
            while len(pending) < 3 and (x := searcher.ask()) is not None:
                pending.append(x)
            if not pending:
                break
            x = pending.pop(len(pending) // 2)
            searcher.tell(x, outcome(x))
            told += 1
        assert told >= 3

    def test_another_seed_asks_for_others(self, name: str) -> None:
        if name == "grid":
            pytest.skip("draws nothing")
        first, other = (run(make(name, seed, random_start=True), 12) for seed in (0, 1))
        assert not all(np.array_equal(a, b) for (a, _), (b, _) in zip(first, other, strict=True))


@pytest.mark.parametrize("name", CLIMBERS)
def test_finds_the_target(name: str) -> None:
    done = run(make(name), 150)
    best = max(done, key=lambda each: each[1].values or ())
    assert abs(best[0] - TARGET).max() < (0.05 if name in ("cma", *BY_GRADIENT) else 0.4)


@pytest.mark.parametrize("name", CLIMBERS)
def test_keeps_a_constraint(name: str) -> None:
    done = run(make(name, constraints=1), 150, floor=0.9)
    feasible = [each for each in done if each[1].violation <= 1e-3]
    best = max(feasible, key=lambda each: each[1].values or ())
    assert abs(best[0] - [0.9, -0.2, 0.7]).max() < (0.05 if name in ("cma", *BY_GRADIENT) else 0.5)


@pytest.mark.parametrize("name", MULTI_OBJECTIVE)
def test_takes_two_objectives(name: str) -> None:
    searcher = make(name, objectives=2)
    for _ in range(30):
        x = searcher.ask()
        assert x is not None
        searcher.tell(x, Outcome((float(x[0]), -(float(x[0]) ** 2))))


def test_grid_tries_every_combination_once() -> None:
    asked = [tuple(x) for x, _ in run(make("grid"), 1000)]
    assert len(asked) == len(set(asked)) == 4**3
    assert (0.0, -1.0, 0.0) in asked
    assert (2.0, 1.0, 1.0) in asked


def test_the_start_comes_first() -> None:
    for name in (*BY_GRADIENT, "nsga2", "tpe", "random"):
        ((x, _),) = run(make(name), 1)
        assert x.tolist() == [1.0, 0.5, 1.0]


def test_a_line_search_ends_where_rounding_hides_what_it_looks_for() -> None:
    searcher, generator = make("gradient"), np.random.default_rng(0)
    asked = []
    while len(asked) < 30 and (x := searcher.ask()) is not None:
        asked.append(x)
        (value,), _, (slope,) = outcome(x)
        noise = 1 + 0.1 * generator.normal(size=3)
        searcher.tell(x, Outcome((round(value, 2),), (), np.array([slope * noise])))
    assert max(outcome(x).values[0] for x in asked) > -0.01
    assert all(np.linalg.norm(one - other) > 1e-4 for one, other in pairwise(asked))
