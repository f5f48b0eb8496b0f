"""Racing: what is losing stops early, what wins has seen every sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from mergekit_align.evolve.config import Floor
from mergekit_align.evolve.racing import MISTAKES, Race, make_slices
from mergekit_align.evolve.sample_values import Metric, SampleValues

WriteConfig = Callable[..., Path]

SIZES = {"one": 200, "other": 120}
WEIGHTS: dict[Metric, float] = {("one", "logprob,none"): 1.0, ("other", "logprob,none"): 0.5}


def values(rng: np.random.Generator, better: float = 0.0) -> SampleValues:
    return {each: rng.normal(better, 1.0, SIZES[each[0]]) for each in WEIGHTS}


def stops(own: SampleValues, rival: SampleValues, floors: list[Floor] | None = None) -> int | None:
    """After which slice."""
    slices = make_slices(SIZES)
    race = Race(WEIGHTS, floors or [], slices)
    lost = (n for n in range(len(slices) - 1) if race.is_lost(own, rival, n))
    return next(lost, None)


def test_slices_have_every_sample_once_and_a_share_of_every_task() -> None:
    slices = make_slices(SIZES)
    for name, size in SIZES.items():
        assert sorted(place for each in slices for place in each[name]) == list(range(size))
        assert len(slices[0][name]) == size / 8
    assert make_slices(SIZES) == slices
    (only,) = make_slices({"few": 5})
    assert list(only["few"]) == list(range(5))


def test_what_is_much_worse_stops_after_the_first_slice() -> None:
    rng = np.random.default_rng(0)
    assert stops(values(rng, better=-2.0), values(rng)) == 0
    assert stops(values(rng, better=2.0), values(rng)) is None


def test_what_is_as_good_is_hardly_ever_stopped() -> None:
    rng = np.random.default_rng(1)
    stopped = 0
    for _ in range(1000):
        own, rival = values(rng), values(rng)
        for metric in own:  # as good on all samples together
            own[metric] += rival[metric].mean() - own[metric].mean()
        stopped += stops(own, rival) is not None
    assert 0 < stopped <= 1000 * MISTAKES
