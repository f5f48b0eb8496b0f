"""Gradient ascent on the fitness, by L-BFGS-B within the genes' bounds (scipy) or by Adam, with floors.

A floor is met by an augmented Lagrangian (Nocedal & Wright, Numerical Optimization, 2nd ed., section
17.4): a penalty on what is missed, and a multiplier that learns what missing it is worth, raised
after every few steps. scipy calls its objective, where a searcher is asked and told; so at each ask the
optimiser runs anew over the evaluations that there are, as far as the first that there is not.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize

from mergekit_align.evolve.genes import Array, Genotype
from mergekit_align.evolve.searchers.base import Outcome, Searcher, Space

_PENALTY = 10.0
_PENALTY_GROWTH = 4.0
_STEPS = 5  # between two updates of the multipliers
_ROUNDS = 50
_LINE_SEARCH = 4
"""Candidates of a line search. Rounding in bfloat16 may hide what it looks for; L-BFGS then forgets the
curvature that it knows and goes on from its last point."""
# Adam's: how much of the mean gradient and square is kept, a step's share of a gene's range, and the
# steps over which it falls to 1 / sqrt(2) of that
_MEMORY, _SQUARE_MEMORY = 0.9, 0.99
_FIRST_STEP, _HALVING = 0.05, 5


Slope = Callable[[Array], tuple[float, Array]]
"""What is minimised, and its gradient."""


class _UnknownError(Exception):
    """The optimiser asks for a candidate that was not evaluated yet."""


class GradientSearcher(Searcher):
    """One candidate after another, each where the gradients of those before lead.

    A candidate that failed counts as one that no step should lead to.
    """

    def __init__(self, space: Space, *, seed: int) -> None:
        self._space = space
        self._start = space.start
        if space.random_start:
            self._start = np.random.default_rng(seed).uniform(space.low, space.high)
        self._told: dict[bytes, Outcome] = {}
        self._asked: set[bytes] = set()
        self._worst = 0.0

    def ask(self) -> Genotype | None:
        try:
            self._optimise()
        except _UnknownError as unknown:
            genotype: Genotype = unknown.args[0]
            if genotype.tobytes() in self._asked:
                return None
            self._asked.add(genotype.tobytes())
            return genotype
        return None

    def tell(self, genotype: Genotype, outcome: Outcome) -> None:
        self._told[genotype.tobytes()] = outcome
        if outcome.values is not None:
            self._worst = min(self._worst, outcome.values[0])

    def _optimise(self) -> None:
        multipliers = np.zeros(self._space.constraints)
        penalty, missed, point = _PENALTY, np.inf, self._start
        for _ in range(_ROUNDS):

            def lagrangian(x: Array) -> tuple[float, Array]:
                return self._lagrangian(x, multipliers, penalty)  # noqa: B023 (called in this round)

            point = self._minimise(lagrangian, point, _STEPS if self._space.constraints else None)
            if not self._space.constraints:
                return
            outcome = self._outcome(point)
            multipliers = np.maximum(0.0, multipliers + penalty * np.array(outcome.violations))
            if outcome.violation > missed / 2:
                penalty *= _PENALTY_GROWTH
            missed = outcome.violation

    def _minimise(self, slope: Slope, point: Array, steps: int | None) -> Array:
        """Where `steps` lead, or as many as it takes."""
        found: Array = minimize(
            slope,
            point,
            jac=True,
            method="L-BFGS-B",
            bounds=list(zip(self._space.low, self._space.high, strict=True)),
            options={"maxls": _LINE_SEARCH} | ({} if steps is None else {"maxiter": steps}),
        ).x
        return found

    def _outcome(self, x: Array) -> Outcome:
        outcome = self._told.get(x.tobytes())
        if outcome is None:
            raise _UnknownError(x.copy())
        return outcome

    def _lagrangian(self, x: Array, multipliers: Array, penalty: float) -> tuple[float, Array]:
        """Minus the fitness, with what the missed floors cost, and its gradient."""
        outcome = self._outcome(x)
        if outcome.values is None or outcome.gradient is None:
            return abs(self._worst) + 1e3, np.zeros_like(x)
        value, gradient = -outcome.values[0], -outcome.gradient[0]
        for missed, own, multiplier in zip(
            outcome.violations, outcome.gradient[1:], multipliers, strict=True
        ):
            force = max(0.0, multiplier + penalty * missed)
            value += (force**2 - multiplier**2) / (2 * penalty)
            gradient = gradient + force * own
        return value, gradient


class AdamSearcher(GradientSearcher):
    """Steps by Adam (Kingma & Ba, arXiv 1412.6980, algorithm 1), each an evaluation.

    For a fitness that is too uneven for the line search of L-BFGS; a gene's step does not depend on how
    large its gradient is, only on how steady. Steps begin at a twentieth of a gene's range.
    """

    def _minimise(self, slope: Slope, point: Array, steps: int | None) -> Array:
        low, high = self._space.low, self._space.high
        mean, square = np.zeros_like(point), np.zeros_like(point)
        count = 0
        while steps is None or count < steps:
            _, gradient = slope(point)
            count += 1
            mean = _MEMORY * mean + (1 - _MEMORY) * gradient
            square = _SQUARE_MEMORY * square + (1 - _SQUARE_MEMORY) * gradient**2
            unbiased = mean / (1 - _MEMORY**count)
            size = np.sqrt(square / (1 - _SQUARE_MEMORY**count)) + np.finfo(float).tiny
            rate = _FIRST_STEP * (high - low) / np.sqrt(1 + count / _HALVING)
            further = np.clip(point - rate * unbiased / size, low, high)
            if np.array_equal(further, point):
                break
            point = further
        return point
