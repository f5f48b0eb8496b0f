"""Where candidates are evaluated: in this process, or by several workers at the same time.

A worker is a Ray actor with a model and inputs of its own, on one GPU where there are GPUs. It takes
the next candidate as soon as it has done one. Where it is lost, with its node or by itself, another
takes its place and its candidate is evaluated again.
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

from mergekit_align.errors import InputError
from mergekit_align.evolve.candidate import Evaluator, Result
from mergekit_align.evolve.config import EvolveConfig, read_config
from mergekit_align.evolve.genes import Genotype
from mergekit_align.evolve.racing import Standing

ADDRESS_TIMEOUT = 20.0
"""Seconds in which a cluster must answer."""


class Done(NamedTuple):
    """A candidate that was evaluated."""

    number: int
    result: Result


class Pool(ABC):
    """Evaluates up to `size` candidates at the same time."""

    size: int

    @abstractmethod
    def submit(self, number: int, genotype: Genotype, standing: Standing | None = None) -> None:
        """Begin with a candidate, which races `standing`; there are fewer than `size`."""

    @abstractmethod
    def wait(self) -> Done:
        """The next that is done, in any order.

        Raises:
            InputError: the config cannot be used.
        """


class InProcess(Pool):
    """One candidate after another, here."""

    size = 1

    def __init__(self, evaluator: Callable[[], Evaluator], *, gradient: bool) -> None:
        self._evaluator = evaluator
        self._gradient = gradient
        self._next: tuple[int, Genotype, Standing | None] | None = None

    def submit(self, number: int, genotype: Genotype, standing: Standing | None = None) -> None:
        self._next = number, genotype, standing

    def wait(self) -> Done:
        assert self._next is not None
        number, genotype, standing = self._next
        evaluator = self._evaluator()
        return Done(
            number, evaluator.evaluate(genotype, gradient=self._gradient, standing=standing)
        )


class RayPool(Pool):
    """Workers on this machine, or on a cluster, whose nodes see the config's files at the same paths.

    Args:
        address: of a running cluster; by default one of this machine's own.

    Raises:
        InputError: there is no such cluster, or it has too few processors.
    """

    def __init__(
        self, config: EvolveConfig, count: int, *, address: str | None, gradient: bool
    ) -> None:
        import ray

        self.size = count
        self._config = config
        self._gradient = gradient
        self._running: dict[Any, tuple[int, Genotype, Standing | None, Any]] = {}
        if address is not None:
            _check_answers(address)
        if not ray.is_initialized():
            ray.init(address=address, include_dashboard=False, log_to_driver=False)
        kind = "GPU" if config.device.startswith("cuda") else "CPU"
        there = int(ray.cluster_resources().get(kind, 0))
        if there < count:
            raise InputError(f"--workers: found {count}; expected at most {there}, one a {kind}")
        self._actor = ray.remote(num_cpus=1, num_gpus=int(kind == "GPU"))(_Worker)
        self._idle = [self._start() for _ in range(count)]

    def submit(self, number: int, genotype: Genotype, standing: Standing | None = None) -> None:
        worker = self._idle.pop()
        reference = worker.evaluate.remote(genotype, self._gradient, standing)
        self._running[reference] = number, genotype, standing, worker

    def wait(self) -> Done:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        while True:
            (reference,), _ = ray.wait(list(self._running), num_returns=1)
            number, genotype, standing, worker = self._running.pop(reference)
            try:
                result = ray.get(reference)
            except RayTaskError as error:
                if isinstance(error.cause, InputError):
                    raise error.cause from error
                raise
            except RayActorError:
                self._idle.append(self._start())
                self.submit(number, genotype, standing)
                continue
            self._idle.append(worker)
            return Done(number, result)

    def _start(self) -> Any:
        return self._actor.remote(self._config.path, self._config.given)


class _Worker:
    """The config is read where it is used: lm-eval's tasks do not travel."""

    def __init__(self, path: str, given: dict[str, Any]) -> None:
        self._evaluator = Evaluator(read_config(path, **given))

    def evaluate(self, genotype: Genotype, gradient: bool, standing: Standing | None) -> Result:
        return self._evaluator.evaluate(genotype.copy(), gradient=gradient, standing=standing)


def _check_answers(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=ADDRESS_TIMEOUT):
            pass
    except (OSError, ValueError) as error:
        raise InputError(
            f"--ray-address: found {address}, which does not answer within {ADDRESS_TIMEOUT:.0f} s "
            f"({error}); expected HOST:PORT of a Ray cluster"
        ) from error
